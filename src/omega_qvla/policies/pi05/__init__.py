"""pi0.5, of Physical Intelligence."""
