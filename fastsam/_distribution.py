"""The distribution is called fused-sam: on PyPI, ``fastsam`` is another project, whose folder has the same name."""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path

__all__ = ["warn_of_another_owner"]


def warn_of_another_owner() -> None:
    """Warns where a distribution called ``fastsam`` has files in this folder, which then are no longer one's own."""
    try:
        other = metadata.distribution("fastsam")
    except metadata.PackageNotFoundError:
        return
    here = Path(__file__).parent
    if any(Path(str(other.locate_file(file))).parent == here for file in other.files or ()):
        warnings.warn(
            f"the distribution fastsam {other.version} is installed into the folder of fused-sam, {here}; it is "
            "another project, or an old name of this one: pip uninstall fastsam, then install fused-sam again with "
            "--force-reinstall --no-deps",
            stacklevel=3,
        )
