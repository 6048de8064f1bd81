"""A policy behind a socket: bounded messages, bounded queues, checked actions."""
