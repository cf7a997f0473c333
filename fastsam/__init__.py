"""fastsam: the fused sharpness-aware step (SAM, Foret et al. 2021, arXiv 2010.01412) for PyTorch."""

from fastsam._distribution import warn_of_another_owner as _warn_of_another_owner
from fastsam._version import __version__ as __version__
from fastsam.backends import available_backends as available_backends
from fastsam.batchnorm import (
    disable_running_stats as disable_running_stats,
    enable_running_stats as enable_running_stats,
    frozen_running_stats as frozen_running_stats,
)
from fastsam.optimizer import SAM as SAM, FusedSAM as FusedSAM

__all__ = [
    "SAM",
    "FusedSAM",
    "__version__",
    "available_backends",
    "disable_running_stats",
    "enable_running_stats",
    "frozen_running_stats",
]

_warn_of_another_owner()
