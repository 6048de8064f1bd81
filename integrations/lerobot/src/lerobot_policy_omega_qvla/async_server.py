"""LeRobot's asynchronous policy server, told that this type exists.

LeRobot's server has a closed list of types and looks for no plug-ins, so this one adds a name to
its list before it starts.  **Its protocol is pickle: whoever can reach the port can run any code as
the user it runs under.**  LeRobot has no login and no encryption for it.  Keep it on 127.0.0.1 or a
network of your own, or use ``omega-qvla serve``, whose protocol executes nothing.
"""

from __future__ import annotations

import sys

from lerobot_policy_omega_qvla.configuration_omega_qvla import OmegaQvlaConfig

_RISK = (
    "LeRobot's asynchronous server reads pickle from the network: whoever reaches its port can "
    "run code as this user. Keep it on 127.0.0.1 or a closed network; the protocol of "
    "`omega-qvla serve` executes nothing."
)


def main() -> None:
    """Start LeRobot's server; its own options."""
    from lerobot.async_inference import constants, policy_server

    sys.stderr.write(_RISK + "\n")
    name = OmegaQvlaConfig.get_choice_name(OmegaQvlaConfig)
    if name not in constants.SUPPORTED_POLICIES:
        constants.SUPPORTED_POLICIES.append(name)
    policy_server.serve()


if __name__ == "__main__":
    main()
