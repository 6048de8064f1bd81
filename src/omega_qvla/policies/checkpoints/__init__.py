"""Readers of policy checkpoints, one file per layout.  All are strict and never execute code."""
