"""LeRobot's plug-in for artifacts of omega-qvla.

LeRobot imports this package because of its name; importing it registers the policy type
``omega_qvla`` and the environment ``omega_metaworld``.
"""

from lerobot_policy_omega_qvla.configuration_omega_qvla import OmegaQvlaConfig
from lerobot_policy_omega_qvla.metaworld_env import OmegaMetaworldEnv

__all__ = ["OmegaMetaworldEnv", "OmegaQvlaConfig"]
