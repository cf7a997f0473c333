"""Triton's interpreter with less to do: a plugin for the pytest that test_triton.py starts.

At each call of a function in a kernel, the interpreter looks through triton.language and puts its own functions there.
The launch of the kernel has put them by then. Those of a module that the kernel does not see are put by the first call.
"""

import functools
from typing import Any

from triton.runtime import interpreter

_put_functions = functools.cache(interpreter._patch_lang)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    _put_functions(self.fn)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call
