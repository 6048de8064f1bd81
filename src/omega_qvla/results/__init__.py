"""What evaluations write and reports read: the documents, their statistics, one way to read them.

Everything a command saves as JSON is described here once.  ``docs/json.md`` is written from these
classes (``tools/json_page.py``).
"""
