"""The command line: the only package that parses arguments or prints.

Every command is a dataclass whose fields are its options and whose ``run`` returns the exit status:
0 done; 1 a check failed; 2 bad input or usage; 3 not enough memory, disk or device.
"""

from omega_qvla.cli.entry import main

__all__ = ["main"]
