"""The robot's side: a policy at the other end of a socket, and a loop that acts at a fixed rate."""

from omega_qvla.serving.client.action_queue import Blending
from omega_qvla.serving.client.drive import DriveReport, drive
from omega_qvla.serving.client.remote_policy import RemotePolicy
from omega_qvla.serving.client.session import RetryPolicy

__all__ = ["Blending", "DriveReport", "RemotePolicy", "RetryPolicy", "drive"]
