"""The protocols that robots speak, a module each."""
