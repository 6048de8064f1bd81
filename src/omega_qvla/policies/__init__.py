"""Policies: native pi0.5, and a wrapper for any PyTorch module."""
