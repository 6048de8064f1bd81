"""Policies: native pi0.5, pi0 and GR00T N1.5, and a wrapper for any PyTorch module."""
