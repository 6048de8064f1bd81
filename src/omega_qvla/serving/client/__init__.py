"""The robot's side: a policy at the other end of a socket, and a loop that acts at a fixed rate."""

from omega_qvla.serving.client.action_queue import Blending
from omega_qvla.serving.client.remote_policy import RemotePolicy, drive
from omega_qvla.serving.client.session import Patience

__all__ = ["Blending", "Patience", "RemotePolicy", "drive"]
