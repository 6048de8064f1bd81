"""A policy like pi0 (docs/add-a-policy.md)."""
