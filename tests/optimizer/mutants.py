"""Breaks the state machine on purpose: each mutant has to turn one of the tests that it names red.

    python -m tests.optimizer.mutants [--list] [NAME ...]

A mutant is a change of one place in a file of fastsam/. It lives in a child process alone, which imports the changed
text: no file is written, and what is slow to import is there already. A mutant whose old text is gone is an error. The
exit status is 0 where no mutant survived but those that are known to, each with the reason.
"""
# ruff: noqa: E501 (lines of the sources, as long as they are there)

import argparse
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path

import hypothesis.stateful  # noqa: F401 (slow to import, as torch)
import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
SECONDS = 300
"""A mutant whose tests take longer is killed: it waits for something that never comes."""


@dataclass(frozen=True)
class Mutant:
    """`old`, which is there once, becomes `new`; `tests`: files of tests/optimizer, without "test_" and ".py".

    `survives`: why no test can see it.
    """

    name: str
    path: str
    old: str
    new: str
    tests: str
    survives: str = ""


OPTIMIZER, WRAPPER, MISUSE, FRESHNESS = (f"fastsam/{n}.py" for n in ("optimizer", "wrapper", "misuse", "freshness"))
AMP, CHECKPOINT, PERTURBATION, HOOKS = (f"fastsam/{n}.py" for n in ("amp", "checkpoint", "perturbation", "hooks"))
ARGUMENTS, DIRECTION, PLACES, OPTIONS = (f"fastsam/{n}.py" for n in ("arguments", "direction", "places", "options"))
DISTRIBUTED, STATE = "fastsam/distributed.py", "fastsam/state.py"

MUTANTS = (
    Mutant(
        "perturb is not looked at",
        PERTURBATION,
        'return params if group["perturb"] else []',
        "return params",
        "perturb",
    ),
    Mutant(
        "perturb is not checked later",
        PERTURBATION,
        ', signs, [group["perturb"] for group in groups])',
        ", signs)",
        "perturb",
    ),
    Mutant(
        "no group to perturb is no error",
        PERTURBATION,
        'if groups and not any(group["perturb"]',
        'if False and not any(group["perturb"]',
        "perturb",
    ),
    Mutant(
        "no group to perturb is met late",
        PERTURBATION,
        "        if process_group is None:\n            check_any_perturbed(groups)\n",
        "",
        "perturb",
    ),
    Mutant(
        "the norm counts what is left out",
        PERTURBATION,
        "for j, p in enumerate(_perturbed(group)):\n            name = parameter_name(group, i, j)\n            if (g :=",
        'for j, p in enumerate(group["params"]):\n            name = parameter_name(group, i, j)\n            if (g :=',
        "perturb",
    ),
    Mutant(
        "a toggled group is not seen",
        PERTURBATION,
        "self._params = [list(_perturbed(group)) for group in groups]",
        'self._params = [list(group["params"]) for group in groups]',
        "perturb",
    ),
    Mutant(
        "what is left out is slotless",
        PERTURBATION,
        "        slotless = []\n",
        '        slotless = [p for group in groups if not group["perturb"] for p in group["params"]]\n',
        "perturb",
    ),
    Mutant(
        "_grad_norm of groups without keys",
        OPTIMIZER,
        "        self._complete_groups()\n        misuse.check_process_group(self._lost)\n",
        "        misuse.check_process_group(self._lost)\n",
        "perturb",
    ),
    Mutant(
        "a loss at w is kept",
        STATE,
        "if self.perturbed and isinstance(loss,",
        "if isinstance(loss,",
        "perturbed_loss",
    ),
    Mutant(
        "the loss keeps its graph",
        STATE,
        "loss.detach() if isinstance(loss, Tensor) else loss",
        "loss",
        "perturbed_loss",
    ),
    Mutant(
        "numbers are no losses",
        STATE,
        "Tensor | numbers.Real",
        "Tensor",
        "perturbed_loss",
    ),
    Mutant(
        "the last step's loss stays",
        OPTIMIZER,
        "        if not state.perturbed:  # else first_step did, and a trainer's closure may have run since\n            state.perturbed_loss = None\n",
        "",
        "perturbed_loss",
    ),
    Mutant(
        "first_step keeps the last loss",
        OPTIMIZER,
        "        state.perturbed_loss = None\n        try:\n            climbed",
        "        try:\n            climbed",
        "perturbed_loss",
    ),
    Mutant(
        "start is not looked at",
        OPTIMIZER,
        "steps >= self.start and (steps + 1)",
        "(steps + 1)",
        "start",
    ),
    Mutant(
        "start is one late",
        OPTIMIZER,
        "steps >= self.start and",
        "steps > self.start and",
        "start",
    ),
    Mutant(
        "interval counts from 1",
        OPTIMIZER,
        "(steps + 1) % self.interval == 0",
        "steps % self.interval == 0",
        "interval",
    ),
    Mutant(
        "ascending while perturbed",
        OPTIMIZER,
        " and self.is_sam_step and not self.perturbed",
        " and self.is_sam_step",
        "interval start optimizer api batchnorm",
    ),
    Mutant(
        "grad_norm is the live tensor",
        PERTURBATION,
        "                return scalars.norm.clone()",
        "                return scalars.norm",
        "optimizer api",
    ),
    Mutant(
        "grad_norm keeps the loss scale",
        PERTURBATION,
        "            return scalars.norm / self.loss_scale.to(scalars.norm.device, non_blocking=True)",
        "            return scalars.norm.clone()",
        "amp",
    ),
    Mutant(
        "first_step twice",
        OPTIMIZER,
        '        self._require_idle("first_step()")\n',
        "",
        "errors optimizer misuse",
    ),
    Mutant(
        "first_step always clears",
        OPTIMIZER,
        "if climbed and zero_grad:",
        "if climbed:",
        "optimizer meetings",
    ),
    Mutant(
        "first_step never clears",
        OPTIMIZER,
        "if climbed and zero_grad:",
        "if False:",
        "optimizer meetings",
    ),
    Mutant(
        "a failed first_step stays perturbed",
        OPTIMIZER,
        "        except BaseException:\n            self._restore()\n            raise\n        if not climbed:",
        "        except BaseException:\n            raise\n        if not climbed:",
        "corners",
    ),
    Mutant(
        "first_step rehearses nothing",
        OPTIMIZER,
        "        if not climbed:\n            self._rehearse()\n",
        "        if not climbed:\n",
        "start",
    ),
    Mutant(
        "step rehearses nothing",
        OPTIMIZER,
        "        self._restore()\n        self._rehearse()\n        if valid:",
        "        self._restore()\n        if valid:",
        "start",
    ),
    Mutant(
        "an old plain step goes on",
        OPTIMIZER,
        "        self._end_between()\n        state.perturbed_loss = None\n        try:\n            climbed",
        "        state.perturbed_loss = None\n        try:\n            climbed",
        "misuse",
    ),
    Mutant(
        "second_step never clears",
        OPTIMIZER,
        "            if zero_grad:\n                self.zero_grad()\n        except BaseException:\n            self._mark_stale()",
        "            if False:\n                self.zero_grad()\n        except BaseException:\n            self._mark_stale()",
        "optimizer meetings",
    ),
    Mutant(
        "second_step leaves fresh gradients",
        OPTIMIZER,
        "state.will_clear = zero_grad",
        "state.will_clear = True",
        "closure closure_passes meetings",
    ),
    Mutant(
        "a failed second_step leaves fresh gradients",
        OPTIMIZER,
        "        except BaseException:\n            self._mark_stale()\n            raise\n        finally:\n            state.will_clear = False",
        "        except BaseException:\n            raise\n        finally:\n            state.will_clear = False",
        "corners",
    ),
    Mutant(
        "state initialisation while perturbed",
        OPTIMIZER,
        "if closure is None and not state.perturbed and state.between is None and is_state",
        "if closure is None and is_state",
        "checkpoint schedules start",
    ),
    Mutant(
        "the base steps at w + e_w",
        OPTIMIZER,
        "        self._restore()\n        self._rehearse()\n        if valid:",
        "        self._rehearse()\n        if valid:",
        "optimizer closure",
    ),
    Mutant(
        "a step that trainers skip is taken",
        OPTIMIZER,
        "        if valid:\n",
        "        if True:\n",
        "meetings closure closure_passes",
        "only the closures of Lightning and Composer skip: tests/frameworks kills it",
    ),
    Mutant(
        "steps are not counted",
        OPTIMIZER,
        "        self._count_step(completed)\n        return loss",
        "        return loss",
        "interval",
    ),
    Mutant(
        "step hooks run twice",
        OPTIMIZER,
        "                    for post_hook in post_hooks:",
        "                    for post_hook in 2 * [*post_hooks]:",
        "hooks",
    ),
    Mutant(
        "pre-hooks change nothing",
        OPTIMIZER,
        "args, kwargs = _call_pre_hook(pre_hook, sam, args, kwargs)",
        "_call_pre_hook(pre_hook, sam, args, kwargs)",
        "hooks torch_suite",
    ),
    Mutant(
        "an exception leaves w + e_w",
        OPTIMIZER,
        "            except BaseException:\n                sam._restore()\n",
        "            except BaseException:\n",
        "closure interrupt",
    ),
    Mutant(
        "an exception leaves fresh gradients",
        OPTIMIZER,
        "                sam._restore()\n                sam._mark_stale()\n",
        "                sam._restore()\n",
        "closure closure_passes meetings",
    ),
    Mutant(
        "an exception leaves the scale",
        OPTIMIZER,
        "                amp.clear_scaler_attributes(sam)\n",
        "",
        "amp amp_misuse",
    ),
    Mutant(
        "restore leaves fresh gradients",
        OPTIMIZER,
        "        if self._state.phase is not Phase.AT_W:\n            self._restore()\n            self._mark_stale()",
        "        if self._state.phase is not Phase.AT_W:\n            self._restore()",
        "closure_passes",
    ),
    Mutant(
        "with sam leaves w + e_w",
        OPTIMIZER,
        "        self.restore()\n\n    # -- parts",
        "        return\n\n    # -- parts",
        "interrupt optimizer misuse",
    ),
    Mutant(
        "a lone step steps at w",
        OPTIMIZER,
        "if not state.perturbed and self.is_sam_step and (state.direction.two_passes or not announced):",
        "if False:",
        "errors optimizer misuse meetings",
    ),
    Mutant(
        "along the momentum the first step fails",
        OPTIMIZER,
        "(state.direction.two_passes or not announced):",
        "True:",
        "momentum",
    ),
    Mutant(
        "scaler.step(sam, closure) goes on",
        OPTIMIZER,
        "        if amp.in_scaler_step(self):\n            raise",
        "        if False:\n            raise",
        "amp_misuse amp",
    ),
    Mutant(
        "first_pass_context around plain passes",
        OPTIMIZER,
        "        loss = self._call(passes.plain)\n        return loss, not (passes.by_trainer and loss is None)\n\n    def _run_along",
        "        with nullcontext() if self.first_pass_context is None else self.first_pass_context():\n            loss = self._call(passes.plain)\n        return loss, not (passes.by_trainer and loss is None)\n\n    def _run_along",
        "interval",
    ),
    Mutant(
        "a plain step climbs",
        OPTIMIZER,
        "        if not self.is_sam_step and not self._state.perturbed:\n            return self._run_plain(passes)\n",
        "",
        "interval",
    ),
    Mutant(
        "gradients at w stay in a closure",
        OPTIMIZER,
        "            self._perturb()\n            self.zero_grad()\n",
        "            self._perturb()\n",
        "closure",
    ),
    Mutant(
        "gradients at w stay along the momentum",
        OPTIMIZER,
        "            self.zero_grad()  # those at w, of a loop that was written for SAM\n",
        "",
        "momentum",
    ),
    Mutant(
        "restore() in a closure goes unseen",
        OPTIMIZER,
        '        if not self._state.perturbed:\n            raise RuntimeError("restore() was called, by a signal handler, while the closure',
        '        if False:\n            raise RuntimeError("restore() was called, by a signal handler, while the closure',
        "signals meetings",
    ),
    Mutant(
        "closure_passes two takes what is there",
        OPTIMIZER,
        'if self.closure_passes == "two":\n            return False',
        "if False:\n            return False",
        "closure_passes",
    ),
    Mutant(
        "closure_passes one takes anything",
        OPTIMIZER,
        'if not fresh and self.closure_passes == "one":',
        "if False:",
        "closure_passes",
    ),
    Mutant(
        "closure_passes one forgets gradients at construction",
        OPTIMIZER,
        'if self.closure_passes != "one":\n            self._mark_stale()',
        "if True:\n            self._mark_stale()",
        "closure_passes meetings",
    ),
    Mutant(
        "gradients at construction are fresh",
        OPTIMIZER,
        'if self.closure_passes != "one":\n            self._mark_stale()',
        "if False:\n            self._mark_stale()",
        "closure closure_passes meetings",
    ),
    Mutant(
        "the notice on closures comes always",
        OPTIMIZER,
        '        if cleared:\n            self.closure_passes = "two"',
        '        if True:\n            self.closure_passes = "two"',
        "closure_passes",
    ),
    Mutant(
        "counted gradients stay fresh",
        OPTIMIZER,
        "        if not self._state.will_clear:\n            self._mark_stale()",
        "        pass",
        "closure closure_passes meetings",
    ),
    Mutant(
        "an unscaled first gradient is taken",
        OPTIMIZER,
        "        amp.check_first_gradient(self.grad_scaler, self, self.base_optimizer)\n",
        "",
        "amp_misuse",
    ),
    Mutant(
        "no gradient is no error",
        OPTIMIZER,
        "        elif not there:\n            raise no_gradient_error(self.param_groups)",
        "        elif not there:\n            return False",
        "errors optimizer meetings",
    ),
    Mutant(
        "momentum is not looked at",
        OPTIMIZER,
        "            misuse.check_momentum(state, self.base_optimizer, self._parameters, self._steps, there)",
        "            pass",
        "momentum",
    ),
    Mutant(
        "perturb comes before its mark",
        OPTIMIZER,
        "        state.phase = Phase.CLIMBING\n        try:\n            perturbation.perturb()",
        "        try:\n            perturbation.perturb()\n            state.phase = Phase.CLIMBING",
        "signals interrupt",
    ),
    Mutant(
        "restore() within perturb goes unseen",
        OPTIMIZER,
        "            if state.phase is Phase.INTERRUPTED:\n                raise",
        "            if False:\n                raise",
        "signals",
    ),
    Mutant(
        "autocast casts survive the ascent",
        OPTIMIZER,
        "        torch.clear_autocast_cache()\n        return True",
        "        return True",
        "autocast",
    ),
    Mutant(
        "autocast casts survive the restore",
        OPTIMIZER,
        "        state.phase = Phase.INTERRUPTED if writing else Phase.AT_W\n        torch.clear_autocast_cache()",
        "        state.phase = Phase.INTERRUPTED if writing else Phase.AT_W",
        "autocast",
    ),
    Mutant(
        "the backup goes at a first signal",
        OPTIMIZER,
        "state.perturbation.restore(again=writing)",
        "state.perturbation.restore(again=False)",
        "signals",
    ),
    Mutant(
        "state initialisation at any rate",
        CHECKPOINT,
        "        if lr != 0:\n            return False\n",
        "",
        "checkpoint start interval schedules",
    ),
    Mutant(
        "state initialisation with gradients",
        CHECKPOINT,
        "return not any(local(p.grad).any() for p in params if p.grad is not None)",
        "return True",
        "checkpoint start schedules interval",
    ),
    Mutant(
        "zero_grad forgives nothing",
        OPTIMIZER,
        "            state.between.forgive()\n",
        "            pass\n",
        "misuse meetings",
    ),
    Mutant(
        "zeros are fresh",
        OPTIMIZER,
        "        if not gone:\n            self._mark_stale()",
        "        if False:\n            self._mark_stale()",
        "closure_passes closure meetings",
    ),
    Mutant(
        "the base may step at w + e_w",
        OPTIMIZER,
        '        """Returns how many steps are completed where somebody else steps the base optimizer; else None."""\n        if self._state.perturbed:',
        '        """Returns how many steps are completed where somebody else steps the base optimizer; else None."""\n        if False:',
        "misuse errors meetings",
    ),
    Mutant(
        "the base leaves fresh gradients",
        OPTIMIZER,
        "            self._end_between()\n            self._count_step(completed)\n            self._opt_called",
        "            self._end_between()\n            self._steps = completed + 1\n            self._opt_called",
        "closure_passes meetings",
    ),
    Mutant(
        "add_param_group while perturbed",
        WRAPPER,
        '        self._require_idle("add_param_group()")\n',
        "",
        "optimizer errors misuse meetings",
    ),
    Mutant(
        "a refused group stays",
        WRAPPER,
        "            groups.pop()\n            raise",
        "            raise",
        "errors",
    ),
    Mutant(
        "a new group's gradients are fresh",
        WRAPPER,
        '            self._mark_stale(groups[-1]["params"])\n',
        "",
        "closure_passes meetings",
    ),
    Mutant(
        "a new group is not flattened",
        WRAPPER,
        "            if self.flatten_parameters:\n                flatten_groups(groups, len(groups) - 1)\n",
        "",
        "flatten",
    ),
    Mutant(
        "a new group is not checked",
        WRAPPER,
        "            check_group(groups, len(groups) - 1)\n",
        "",
        "errors",
    ),
    Mutant(
        "state_dict while perturbed",
        WRAPPER,
        '        self._require_idle("state_dict()")\n',
        "",
        "optimizer checkpoint",
    ),
    Mutant(
        "load_state_dict while perturbed",
        WRAPPER,
        '        self._require_idle("load_state_dict()")\n',
        "",
        "optimizer checkpoint",
    ),
    Mutant(
        "load_state_dict writes to its argument",
        WRAPPER,
        "state_dict = state_dict.copy()  # hooks may write to it",
        "pass",
        "torch_suite",
    ),
    Mutant(
        "a bad option of a state dict is loaded",
        WRAPPER,
        '            check_options({**options, **saved}, f" of param group {i} of the state dict")',
        "            pass",
        "checkpoint errors",
    ),
    Mutant(
        "rho loses its identity",
        WRAPPER,
        'group["rho"] = rho.copy_(torch.as_tensor(group["rho"]))',
        'group["rho"] = torch.as_tensor(group["rho"])',
        "checkpoint",
    ),
    Mutant(
        "plain state dicts lose the options",
        WRAPPER,
        "            for key, value in options.items():\n                group.setdefault(key, value)\n        for post_hook",
        "        for post_hook",
        "checkpoint meetings",
    ),
    Mutant(
        "load hooks change nothing",
        WRAPPER,
        "state_dict = or_default(pre_hook(self, state_dict), state_dict)",
        "pre_hook(self, state_dict)",
        "torch_suite checkpoint",
    ),
    Mutant(
        "options as attributes leave the groups",
        WRAPPER,
        "            group[name] = value",
        "            pass",
        "api optimizer",
    ),
    Mutant(
        "options as attributes leave the defaults",
        WRAPPER,
        "self.defaults[name] = value = OPTIONS[name](value, name)",
        "value = OPTIONS[name](value, name)",
        "api optimizer meetings",
    ),
    Mutant(
        "an option that differs is the first's",
        WRAPPER,
        "if any(value is not values[0] and value != values[0] for value in values):",
        "if False:",
        "api optimizer",
    ),
    Mutant(
        "interval is not checked",
        WRAPPER,
        'SETTINGS["interval"](interval, "interval")',
        "interval",
        "api interval errors",
    ),
    Mutant(
        "start is not checked",
        WRAPPER,
        'SETTINGS["start"](start, "start")',
        "start",
        "api start errors",
    ),
    Mutant(
        "pickle while perturbed",
        WRAPPER,
        '        self._require_idle("pickle and deepcopy")\n',
        "",
        "optimizer checkpoint",
    ),
    Mutant(
        "a pickle forgets what it lost",
        WRAPPER,
        '"_lost": lost}',
        '"_lost": ()}',
        "checkpoint amp_misuse amp",
    ),
    Mutant(
        "a deepcopy loses the scaler",
        WRAPPER,
        '"_of_training": dict(self._of_training), ',
        "",
        "checkpoint amp api",
    ),
    Mutant(
        "a base's train() while perturbed",
        WRAPPER,
        '        self._require_idle(f"{name}()")\n',
        "",
        "api optimizer batchnorm errors",
    ),
    Mutant(
        "left perturbed: any FusedSAM",
        MISUSE,
        "return [other for other in perturbed if any(id(p) in ids for p in other._parameters())]",
        "return perturbed",
        "misuse interrupt meetings",
    ),
    Mutant(
        "left perturbed stays so",
        MISUSE,
        '        restore_unfinished(other._state, "an earlier FusedSAM had been left")',
        "        pass",
        "misuse interrupt meetings",
    ),
    Mutant(
        "collected: overwrites what was written",
        PERTURBATION,
        "                if p._version != version\n",
        "                if False\n",
        "misuse interrupt meetings",
    ),
    Mutant(
        "collected: stays at w + e_w",
        MISUSE,
        "    written = state.perturbation.restore_unwritten()",
        "    written = False",
        "misuse interrupt meetings",
    ),
    Mutant(
        "a doubled gradient goes unseen",
        MISUSE,
        "if isinstance(state.between, PlainStep) and state.between.doubled:",
        "if False:",
        "misuse",
    ),
    Mutant(
        "no second gradient goes unsaid",
        MISUSE,
        '        tell_once(\n            "no second gradient"',
        '        str(\n            "no second gradient"',
        "misuse",
    ),
    Mutant(
        "a lost scaler goes unseen",
        MISUSE,
        'if "grad_scaler" in lost:',
        "if False:",
        "checkpoint amp_misuse amp",
    ),
    Mutant(
        "a lost context goes unsaid",
        MISUSE,
        'if "first_pass_context" in lost:',
        "if False:",
        "checkpoint closure misuse",
    ),
    Mutant(
        "a gradient at w along the momentum goes unsaid",
        MISUSE,
        "if not state.examined and state.stale.any_fresh(params()):",
        "if False:",
        "momentum",
    ),
    Mutant(
        "no momentum after some steps goes unsaid",
        MISUSE,
        "    elif steps > 0:\n",
        "    elif False:\n",
        "momentum",
    ),
    Mutant(
        "other state than momentum goes unseen",
        MISUSE,
        "elif keeps_other_state(base, params()):",
        "elif False:",
        "momentum",
    ),
    Mutant(
        "fresh: by the object alone",
        FRESHNESS,
        "any(getattr(g, self._name, None) != _version(g)",
        "any(getattr(g, self._name, None) is None",
        "closure closure_passes meetings",
    ),
    Mutant(
        "fresh: one mark for all optimizers",
        FRESHNESS,
        'self._name = f"_fastsam_{secrets.token_hex(8)}"',
        'self._name = "_fastsam"',
        "closure_passes closure checkpoint meetings",
    ),
    Mutant(
        "a plain step sees other gradients",
        FRESHNESS,
        "self.doubled |= p.grad is self._grad",
        "self.doubled = True",
        "misuse",
    ),
    Mutant(
        "a plain step is not forgiven",
        FRESHNESS,
        "        self._grad = None\n        self.doubled = False",
        "        self._grad = None",
        "misuse meetings",
    ),
    Mutant(
        "a plain step is watched for ever",
        FRESHNESS,
        "        if self._handle is not None:\n            self._handle.remove()",
        "        pass",
        "misuse corners optimizer",
    ),
    Mutant(
        "a stand-in stays",
        FRESHNESS,
        "                self._p.grad = None\n        return self.cleared",
        "                pass\n        return self.cleared",
        "closure_passes meetings",
    ),
    Mutant(
        "no stand-in",
        FRESHNESS,
        "            self._zeros = had_grad.grad = torch.zeros_like(had_grad)",
        "            pass",
        "closure_passes",
    ),
    Mutant(
        "a copy's step marks the original's",
        HOOKS,
        "self._found = method() if method is not None and optimizer is self._base() else None",
        "self._found = method() if method is not None else None",
        "hooks",
    ),
    Mutant(
        "hooks of a patched step: not before",
        HOOKS,
        "        for around in self.around:\n            around.before(base)\n",
        "",
        "hooks misuse",
    ),
    Mutant(
        "hooks of a patched step: not after",
        HOOKS,
        "        for around in self.around:\n            around.after(base)\n",
        "",
        "hooks misuse",
    ),
    Mutant(
        "zero_grad of a copy clears the original",
        HOOKS,
        '        return getattr, (self._base(), "zero_grad")',
        "        return object.__reduce__(self)",
        "hooks checkpoint",
    ),
    Mutant(
        "zero_grad of somebody else is lost",
        HOOKS,
        "        if self._own is not None:\n            self._own(*args, **kwargs)\n        elif",
        "        if",
        "hooks",
    ),
    Mutant(
        "zero_grad: zeros count as gone",
        HOOKS,
        "mark(bool(lets_go))",
        "mark(True)",
        "closure_passes closure meetings",
    ),
    Mutant(
        "zero_grad lets go where zeros were asked for",
        HOOKS,
        '(args[0] if args else kwargs.get("set_to_none", True))',
        "(args[0] if args else True)",
        "optimizer closure_passes meetings api",
    ),
    Mutant(
        "unscaled on sam goes unseen",
        AMP,
        "if _is_unscaled(scaler, sam) or _is_unscaled(scaler, base):",
        "if _is_unscaled(scaler, base):",
        "amp_misuse",
    ),
    Mutant(
        "unscaled on the base goes unseen",
        AMP,
        "if _is_unscaled(scaler, sam) or _is_unscaled(scaler, base):",
        "if _is_unscaled(scaler, sam):",
        "amp_misuse",
    ),
    Mutant(
        "unscaled on the base at the end goes unseen",
        AMP,
        '    if _is_unscaled(scaler, base):\n        raise RuntimeError("scaler.unscale_() was called on the base',
        '    if False:\n        raise RuntimeError("scaler.unscale_() was called on the base',
        "amp_misuse",
    ),
    Mutant(
        "the scale is not copied",
        AMP,
        "return None if scale is None else scale.clone()",
        "return scale",
        "amp",
    ),
    Mutant(
        "a scheduler's step is lost",
        AMP,
        "    if own is not None:\n            sam.step = own",
        "    if False:\n            sam.step = own",
        "amp schedules",
    ),
    Mutant(
        "sam.step stays replaced",
        AMP,
        "    finally:\n        del sam.step\n",
        "    finally:\n        pass\n",
        "amp schedules",
    ),
    Mutant(
        "fused bases keep the scale",
        AMP,
        "        finally:\n            clear_scaler_attributes(base)",
        "        finally:\n            pass",
        "amp amp_misuse",
    ),
    Mutant(
        "an infinite second gradient is stepped by",
        AMP,
        "    elif not found_inf:",
        "    elif True:",
        "amp meetings",
    ),
    Mutant(
        "gradients keep the scale",
        AMP,
        "        if grad_scale is not None:\n            _unscale(base, grad_scale)\n        base.step()",
        "        base.step()",
        "amp meetings",
    ),
    Mutant(
        "gradients are unscaled in place",
        AMP,
        "        for (p, _), g in zip(pairs, unscaled, strict=True):\n            p.grad = g",
        "        for (_, g), u in zip(pairs, unscaled, strict=True):\n            g.copy_(u)",
        "amp",
    ),
    Mutant(
        "fp16 gradients are unscaled",
        AMP,
        "        if g.dtype is torch.float16:",
        "        if False:",
        "amp amp_misuse",
    ),
    Mutant(
        "grad_scaler is not checked",
        OPTIONS,
        "    if value is not None and not isinstance(value, GradScaler):",
        "    if False:",
        "errors amp_misuse api",
    ),
    Mutant(
        "what davda54 kept is loaded",
        CHECKPOINT,
        'FOREIGN_STATE = ("old_p", "e_w")',
        "FOREIGN_STATE = ()",
        "checkpoint against_peer",
    ),
    Mutant(
        "what Composer kept is loaded",
        CHECKPOINT,
        'FOREIGN_STATE = ("old_p", "e_w")',
        'FOREIGN_STATE = ("old_p",)',
        "checkpoint against_peer",
    ),
    Mutant(
        "empty entries are loaded",
        CHECKPOINT,
        "        if kept or not entry:\n            state[key] = kept",
        "        state[key] = kept",
        "checkpoint",
    ),
    Mutant(
        "a layout of the base's own is looked into",
        CHECKPOINT,
        '    if not isinstance(state_dict.get("state"), dict):',
        "    if False:",
        "checkpoint resume",
    ),
    Mutant(
        "groups that are not saved get no options beside",
        CHECKPOINT,
        "    return {**state_dict, BESIDE: groups}",
        "    return state_dict",
        "checkpoint resume",
    ),
    Mutant(
        "options beside are shared",
        CHECKPOINT,
        "copy.deepcopy(state_dict.get(BESIDE, []))",
        "state_dict.get(BESIDE, [])",
        "checkpoint",
    ),
    Mutant(
        "another order of groups is known",
        PERTURBATION,
        "not self._same_parameters(groups)\n            or process_group",
        "process_group",
        "optimizer moving corners meetings",
    ),
    Mutant(
        "as many parameters are the same ones",
        PERTURBATION,
        "len(known) == len(params) and all(map(is_, known, params)) for known",
        "len(known) == len(params) for known",
        "optimizer moving corners meetings",
    ),
    Mutant(
        "moved parameters are not looked for",
        PERTURBATION,
        "            or any(bucket.moved() for _, bucket in self.buckets)\n",
        "",
        "moving meetings",
    ),
    Mutant(
        "a late gradient is not looked for",
        PERTURBATION,
        "            or any(g is not None for g in map(self.direction.of, self._slotless))\n",
        "",
        "optimizer corners start meetings",
    ),
    Mutant(
        "a failed measure is kept",
        PERTURBATION,
        "        for _, bucket in self.buckets:\n            bucket.release()\n\n    def restore",
        "        pass\n\n    def restore",
        "corners optimizer errors interrupt",
    ),
    Mutant(
        "restores by old addresses",
        PERTURBATION,
        "elif bucket.restorable():",
        "elif True:",
        "moving meetings",
    ),
    Mutant(
        "restores into what moved alone",
        PERTURBATION,
        "            elif bucket.restorable():\n                backend.restore(bucket)\n                bucket.unstage()\n            else:\n",
        "            else:\n",
        "moving",
    ),
    Mutant(
        "changed options wait",
        PERTURBATION,
        "if not on_device and options == self._options:",
        "if self._options is not None:",
        "optimizer api corners meetings",
    ),
    Mutant(
        "climbs along the momentum",
        DIRECTION,
        "lambda group: -1.0, two_passes=False",
        "lambda group: 1.0, two_passes=False",
        "momentum",
    ),
    Mutant(
        "options are not checked in a step",
        PERTURBATION,
        '            check_options(group, f" of param group {i}")',
        "            pass",
        "errors",
    ),
    Mutant(
        "rehearsal: no memory is asked for",
        PERTURBATION,
        "        backups = [bucket.allocate_backup() for _, bucket in trial.buckets]\n        self.rehearsed = bool(backups)",
        "        self.rehearsed = bool(trial.buckets)",
        "start",
    ),
    Mutant(
        "rehearsal: gradients are not looked at",
        PERTURBATION,
        "                bucket.gather()\n        backups",
        "                pass\n        backups",
        "start",
    ),
    Mutant(
        "16 bits go unsaid",
        PERTURBATION,
        "        if short and not self._warned:",
        "        if False:",
        "optimizer corners errors api",
    ),
    Mutant(
        "16 bits are said always",
        PERTURBATION,
        "            self._warned = True\n            warnings",
        "            warnings",
        "optimizer corners errors api",
    ),
    Mutant(
        "_grad_norm is not adaptive",
        PERTURBATION,
        'term = local(p).abs() * g if group["adaptive"] else g',
        "term = g",
        "optimizer api against_peer",
    ),
    Mutant(
        "an option given is what was left over",
        ARGUMENTS,
        "            group[key] = value\n    if replaced",
        "            pass\n    if replaced",
        "optimizer api misuse meetings",
    ),
    Mutant(
        "what is replaced goes unsaid",
        ARGUMENTS,
        "    if replaced:\n",
        "    if False:\n",
        "optimizer api misuse errors",
    ),
    Mutant(
        "frozen parameters have momentum",
        DIRECTION,
        "if not state or not p.requires_grad:",
        "if not state:",
        "momentum meetings",
    ),
    Mutant(
        "the state makes an entry",
        DIRECTION,
        "state = base.state.get(p)  # not [p], which would make an entry",
        "state = base.state[p]",
        "momentum meetings",
    ),
    Mutant(
        "maximizing climbs to the best point",
        DIRECTION,
        '-1.0 if group.get("maximize") else 1.0',
        "1.0",
        "momentum",
    ),
    Mutant(
        "a shared parameter is perturbed twice",
        OPTIMIZER,
        "        misuse.check_shared(self)\n",
        "",
        "misuse",
    ),
    Mutant(
        "a base's own step is not counted",
        OPTIMIZER,
        "        if completed is not None:\n            self._end_between()",
        "        if False:\n            self._end_between()",
        "misuse",
    ),
    Mutant(
        "the end of what is between",
        OPTIMIZER,
        "            self._end_between()\n            self._count_step(completed)\n",
        "            self._count_step(completed)\n",
        "misuse meetings",
    ),
    Mutant(
        "the count restarts with the groups",
        WRAPPER,
        '        return int(self._settings["steps"])',
        "        return 0",
        "corners meetings",
    ),
    Mutant(
        "new groups restart the count",
        WRAPPER,
        'default=self._settings["steps"])',
        "default=0)",
        "corners meetings",
    ),
    Mutant(
        "each group counts for itself",
        WRAPPER,
        "        for group in self.param_groups:\n            group[COUNTER] = steps",
        "        for group in self.param_groups[:1]:\n            group[COUNTER] = steps",
        "interval corners hooks meetings",
    ),
    Mutant(
        "hooks stay for ever",
        HOOKS,
        "            weakref.finalize(cast(Any, before).__self__, handle.remove).atexit = False",
        "            pass",
        "hooks",
    ),
    Mutant(
        "zero_grad is patched again and again",
        HOOKS,
        "    if not isinstance(patch, _ZeroGrad):",
        "    if True:",
        "hooks",
    ),
    Mutant(
        "odd gradients are none",
        DISTRIBUTED,
        '    raise TypeError(\n        f"the {name} is a',
        '    return None\n    raise TypeError(\n        f"the {name} is a',
        "errors",
    ),
    Mutant(
        "hooks see the loss scale",
        AMP,
        "            _unscale(base, grad_scale)\n            sam.grad_scale = None",
        "            pass",
        "amp meetings",
    ),
    Mutant(
        "hooks run on a step that is skipped",
        OPTIMIZER,
        "                            pre_hooks = post_hooks = ()",
        "                            pass",
        "amp meetings",
    ),
    Mutant(
        "versions are not taken",
        PERTURBATION,
        "        self._versions = [[p._version for p in bucket.live_params()] for _, bucket in self.buckets]",
        "        self._versions = [[p._version - 1 for p in bucket.live_params()] for _, bucket in self.buckets]",
        "misuse",
    ),
    Mutant(
        "closures stay in doubt",
        OPTIMIZER,
        '            self.closure_passes = "two"\n            tell_once',
        "            tell_once",
        "closure_passes",
    ),
    Mutant(
        "moved: by the address alone",
        PLACES,
        " or _layouts(tensors) != self._layouts",
        "",
        "moving",
    ),
)


def check(mutant: Mutant) -> str:
    """The source of the mutant's file; raises a ValueError unless its old text is there once."""
    source = (ROOT / mutant.path).read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: its old text is {source.count(mutant.old)} times in {mutant.path}")
    return source


def run(tests: list[str], path: Path | None = None, source: str = "") -> int:
    """Runs the tests, with `source` for the file at `path`."""
    original = SourceFileLoader.get_code

    def get_code(loader, fullname):
        if path is not None and Path(loader.path) == path:
            return compile(source, str(path), "exec", dont_inherit=True)
        return original(loader, fullname)

    SourceFileLoader.get_code = get_code
    files = [f"tests/optimizer/test_{name}.py" for name in tests]
    return int(
        pytest.main(
            ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark", *files]
        )
    )


def judge(tests: list[str], path: Path | None = None, source: str = "") -> tuple[int | None, str]:
    """pytest's exit status in a child process, None where it takes too long, and what it printed."""
    with tempfile.TemporaryFile("w+") as printed:
        child = os.fork()
        if child == 0:
            status = 70
            try:
                for stream in (1, 2):
                    os.dup2(printed.fileno(), stream)
                status = run(tests, path, source)
            finally:
                sys.stdout.flush()
                os._exit(status)
        end = time.monotonic() + SECONDS
        while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, 9)
                os.waitpid(child, 0)
                return None, ""
            time.sleep(0.05)
        printed.seek(0)
        return os.waitstatus_to_exitcode(found[1]), printed.read()


def verdict(mutant: Mutant) -> str:
    """ "killed: ...", "SURVIVED", "survived: ..." where that is known, or "BROKEN: ..."."""
    source = check(mutant)
    status, printed = judge(mutant.tests.split(), ROOT / mutant.path, source.replace(mutant.old, mutant.new))
    if status in (None, 1) or status < 0:
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", printed, flags=re.MULTILINE)
        return f"killed: {failed[1] if failed else status}"
    if status == 0:
        return f"survived: {mutant.survives}" if mutant.survives else "SURVIVED"
    return "killed: does not import" if status == 2 else f"BROKEN: status {status}: {printed[-300:]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutants, or parts of names; default: all")
    parser.add_argument("--list", action="store_true", help="show the mutants, judge none")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.names or any(name in m.name for name in options.names)]
    for mutant in MUTANTS:
        check(mutant)
    if options.list:
        print(*(f"{m.name:<60} {m.path}" for m in chosen), sep="\n")
        return 0
    os.chdir(ROOT)
    torch.set_num_threads(1)
    everything = list(dict.fromkeys(test for m in chosen for test in m.tests.split()))
    status, printed = judge(everything)
    if status != 0:
        print(f"BROKEN: the tests without a mutant: status {status}\n{printed[-2000:]}")
        return 1
    verdicts = []
    for mutant in chosen:
        begin = time.monotonic()
        verdicts.append(verdict(mutant))
        print(f"{mutant.name:<60} {time.monotonic() - begin:4.0f} s  {verdicts[-1]}", flush=True)
    states = [v.split(":")[0] for v in verdicts]
    print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
    return int(any(state.isupper() for state in states))


if __name__ == "__main__":
    sys.exit(main())
