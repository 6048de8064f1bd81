"""Pictures of MuJoCo scenes without a screen, of one model after another.

``mujoco.Renderer`` makes an OpenGL context per model.  A software renderer then compiles its
programs again, a fifth of a second of processor time, where uploading another model's textures and
meshes to a context that is there takes a twentieth: an evaluation that goes through several tasks
with each of many methods would spend more on contexts than on episodes.  Nor do software renderers
survive a second context in one process.  Here the context stays and the model is exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_MAX_GEOMS = 1000
"""Of one scene; MuJoCo's own renderer has room for ten times as many."""


class OffscreenRenderer:
    """Square pictures of the model that was uploaded last.

    Args:
        mujoco: the imported package.
        size: pixels of a side.
        flags_off: names of ``mujoco.mjtRndFlag`` without their prefix, switched off in all scenes.

    Raises:
        Exception: of many kinds, the OpenGL bindings' own; there is no OpenGL to render with.
    """

    def __init__(self, mujoco: Any, size: int, flags_off: Sequence[str] = ()) -> None:
        self._mujoco, self._size, self._flags_off = mujoco, size, tuple(flags_off)
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        self._model: Any = None
        self._scene: Any = None
        self._uploaded: Any = None
        self._context = mujoco.GLContext(size, size)
        self._context.make_current()

    def upload(self, model: Any) -> None:
        """Show this ``MjModel`` from now on, in the place of the one before."""
        mujoco = self._mujoco
        self._context.make_current()
        self._forget()
        self._model = model
        self._scene = mujoco.MjvScene(model=model, maxgeom=_MAX_GEOMS)
        for name in self._flags_off:
            self._scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{name}")] = 0
        self._uploaded = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._uploaded)

    def render(self, data: Any, camera: Any, options: Any) -> npt.NDArray[np.uint8]:
        """What an ``MjvCamera`` sees of the model in the state ``data``, uint8 [size, size, 3]."""
        mujoco = self._mujoco
        self._context.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, options, None, camera, everything, self._scene)
        mujoco.mjr_render(self._viewport, self._scene, self._uploaded)
        rows = np.empty((self._size, self._size, 3), np.uint8)
        mujoco.mjr_readPixels(rows, None, self._viewport, self._uploaded)
        return rows[::-1].copy()  # OpenGL counts rows from the bottom

    def close(self) -> None:
        """Free the context; nothing can be rendered afterwards."""
        self._forget()
        self._context.free()

    def _forget(self) -> None:
        if self._uploaded is not None:
            self._uploaded.free()
            self._uploaded = None
