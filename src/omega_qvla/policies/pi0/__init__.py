"""pi0, of Physical Intelligence."""
