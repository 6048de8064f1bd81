"""``python -m omega_qvla.cli``."""

from omega_qvla.cli.entry import main

main()
