"""The server: what computes, the protocols in front of it, and what may leave for a robot."""
