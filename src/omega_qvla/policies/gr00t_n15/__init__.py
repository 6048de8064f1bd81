"""GR00T N1.5, of NVIDIA."""
