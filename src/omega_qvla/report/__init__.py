"""Tables and figures from saved JSON; imports nothing of the library but its errors."""
