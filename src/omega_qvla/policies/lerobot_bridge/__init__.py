"""Policies of LeRobot that have no engine here: LeRobot's own modules, their linears replaced.

``reading.py`` reads a policy directory of LeRobot, ``policy.py`` is what quantizing and running
see of it, ``kinds.py`` lists the types.  LeRobot is imported by ``library.py`` alone, and only when
such a directory or an artifact of one is given.
"""
