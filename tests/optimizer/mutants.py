"""Breaks the state machine on purpose: each mutant has to turn one of the tests that it names red.

    python -m tests.optimizer.mutants [--list] [NAME ...]

A mutant is a change of one place in a file of fastsam/. It lives in a child process alone, which imports the changed
text: no file is written, and what is slow to import is there already. The tests are run without a mutant first. A
mutant takes 2 or 3 seconds, so all of them some 11 minutes. The exit status is 0 where each was killed.
"""
# ruff: noqa: E501 (lines of the sources, as long as they are there)

import argparse
import importlib
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SECONDS = 300
"""A mutant whose tests take longer is killed: it waits for something that never comes."""


@dataclass(frozen=True)
class Mutant:
    """`old`, which is there once, becomes `new`; `tests`: as pytest is given them in this folder, one or more."""

    name: str
    path: str
    old: str
    new: str
    tests: str


OPTIMIZER, WRAPPER, MISUSE, FRESHNESS = (f"fastsam/{n}.py" for n in ("optimizer", "wrapper", "misuse", "freshness"))
AMP, CHECKPOINT, PERTURBATION, HOOKS = (f"fastsam/{n}.py" for n in ("amp", "checkpoint", "perturbation", "hooks"))
ARGUMENTS, DIRECTION, PLACES, OPTIONS = (f"fastsam/{n}.py" for n in ("arguments", "direction", "places", "options"))
DISTRIBUTED, STATE = "fastsam/distributed.py", "fastsam/state.py"

MUTANTS = (
    Mutant(
        "perturb is not looked at",
        PERTURBATION,
        'return params if group["perturb"] and self.direction.alive(group) else []',
        "return params if self.direction.alive(group) else []",
        "test_perturb.py::test_an_ascent_over_the_chosen_part",
    ),
    Mutant(
        "a dead momentum is climbed along",
        PERTURBATION,
        " and self.direction.alive(group) else []",
        " else []",
        "test_momentum.py::test_a_schedule_that_ends_the_momentum_ends_the_ascent",
    ),
    Mutant(
        "perturb is not checked later",
        PERTURBATION,
        'sign(g), g["perturb"]) for g in groups]',
        "sign(g), True) for g in groups]",
        "test_perturb.py::test_values",
    ),
    Mutant(
        "no group to perturb is no error",
        PERTURBATION,
        "    if not _any_perturbed(groups):\n        raise",
        "    if False:\n        raise",
        "test_perturb.py::test_no_group_to_perturb_is_an_error",
    ),
    Mutant(
        "no group to perturb is told late",
        PERTURBATION,
        "        if process_group is None and not _any_perturbed(groups):",
        "        if False:",
        "test_perturb.py::test_no_group_to_perturb_until_start",
    ),
    Mutant(
        "_grad_norm climbs along",
        PERTURBATION,
        "        trial = Perturbation(self._backend)\n",
        "        trial = Perturbation(self._backend, self.direction)\n",
        "test_momentum.py::test_the_norm_of_the_original_is_the_gradients",
    ),
    Mutant(
        "_grad_norm takes the warning",
        PERTURBATION,
        "trial._warned = True",
        "trial._warned = False",
        "test_api.py::test_grad_norm_of_the_original_is_the_ascents",
    ),
    Mutant(
        "the norm of a step that was refused",
        PERTURBATION,
        "for scalars in self._measured.values()",
        "for scalars in self._scalars.values()",
        "test_optimizer.py::test_grad_norm_after_a_step_that_was_refused",
    ),
    Mutant(
        "a toggled group is not seen",
        PERTURBATION,
        "self._params = [list(self._perturbed(group)) for group in groups]",
        'self._params = [list(group["params"]) for group in groups]',
        "test_perturb.py::test_nothing_is_laid_out_anew_at_each_step",
    ),
    Mutant(
        "what is left out is slotless",
        PERTURBATION,
        "        slotless = []\n",
        '        slotless = [p for group in groups if not group["perturb"] for p in group["params"]]\n',
        "test_perturb.py::test_nothing_is_laid_out_anew_at_each_step",
    ),
    Mutant(
        "_grad_norm of groups without keys",
        OPTIMIZER,
        "        self._complete_groups()\n        misuse.check_process_group(self._lost)\n",
        "        misuse.check_process_group(self._lost)\n",
        "test_perturb.py::test_a_group_that_is_added",
    ),
    Mutant(
        "a loss at w is kept",
        STATE,
        "if self.perturbed and isinstance(loss,",
        "if isinstance(loss,",
        "test_perturbed_loss.py::test_none_on_plain_steps",
    ),
    Mutant(
        "the loss keeps its graph",
        STATE,
        "loss.detach() if isinstance(loss, Tensor) else loss",
        "loss",
        "test_perturbed_loss.py::test_it_is_the_loss_of_the_second_pass",
    ),
    Mutant(
        "numbers are no losses",
        STATE,
        "Tensor | numbers.Real",
        "Tensor",
        "test_perturbed_loss.py::test_it_is_what_the_closure_returned",
    ),
    Mutant(
        "the last step's loss stays",
        OPTIMIZER,
        "        if not state.perturbed:  # else first_step did, and a trainer's closure may have run since\n            state.perturbed_loss = None\n",
        "",
        "test_perturbed_loss.py::test_what_is_no_loss_is_not_kept",
    ),
    Mutant(
        "first_step keeps the last loss",
        OPTIMIZER,
        "        state.perturbed_loss = None\n        try:\n            climbed",
        "        try:\n            climbed",
        "test_perturbed_loss.py::test_none_in_two_calls",
    ),
    Mutant(
        "start is not looked at",
        OPTIMIZER,
        "steps >= self.start and (steps + 1)",
        "(steps + 1)",
        "test_start.py::test_which_steps_are_sam_steps",
    ),
    Mutant(
        "start is one late",
        OPTIMIZER,
        "steps >= self.start and",
        "steps > self.start and",
        "test_start.py::test_which_steps_are_sam_steps",
    ),
    Mutant(
        "interval counts from 1",
        OPTIMIZER,
        "(steps + 1) % self.interval == 0",
        "steps % self.interval == 0",
        "test_interval.py::test_which_steps_are_sam_steps",
    ),
    Mutant(
        "ascending while perturbed",
        OPTIMIZER,
        " and self.is_sam_step and not self.perturbed",
        " and self.is_sam_step",
        "test_start.py::test_ascending_is_the_pass_at_w_of_a_sam_step",
    ),
    Mutant(
        "grad_norm is the live tensor",
        PERTURBATION,
        "                return scalars.norm.clone()",
        "                return scalars.norm",
        "test_optimizer.py::test_grad_norm_is_the_last_ascents",
    ),
    Mutant(
        "grad_norm keeps the loss scale",
        PERTURBATION,
        "            return scalars.norm / self.loss_scale.to(scalars.norm.device, non_blocking=True)",
        "            return scalars.norm.clone()",
        "test_amp.py::test_grad_norm_is_without_the_scale_where_it_is_known",
    ),
    Mutant(
        "first_step twice",
        OPTIMIZER,
        '        self._require_idle("first_step()")\n',
        "",
        "test_optimizer.py::test_what_must_wait_while_perturbed",
    ),
    Mutant(
        "first_step always clears",
        OPTIMIZER,
        "if climbed and zero_grad:",
        "if climbed:",
        "test_optimizer.py::test_zero_grad_of_the_two_calls",
    ),
    Mutant(
        "first_step never clears",
        OPTIMIZER,
        "if climbed and zero_grad:",
        "if False:",
        "test_optimizer.py::test_zero_grad_of_the_two_calls",
    ),
    Mutant(
        "a failed first_step stays perturbed",
        OPTIMIZER,
        "        except BaseException:\n            self._restore()\n            raise\n        if not climbed:",
        "        except BaseException:\n            raise\n        if not climbed:",
        "test_corners.py::test_zero_grad_that_raises_in_first_step_leaves_w",
    ),
    Mutant(
        "first_step rehearses nothing",
        OPTIMIZER,
        "        if not climbed:\n            self._rehearse()\n",
        "",
        "test_start.py::test_the_first_plain_step_refuses_what_a_sam_step_would",
    ),
    Mutant(
        "step rehearses nothing",
        OPTIMIZER,
        "        self._restore()\n        self._rehearse()\n        if valid:",
        "        self._restore()\n        if valid:",
        "test_start.py::test_the_first_plain_step_refuses_what_a_sam_step_would",
    ),
    Mutant(
        "an old plain step goes on",
        OPTIMIZER,
        "        self._end_between()\n        state.perturbed_loss = None\n        try:\n            climbed",
        "        state.perturbed_loss = None\n        try:\n            climbed",
        "test_misuse.py::test_first_step_again_watches_anew",
    ),
    Mutant(
        "second_step never clears",
        OPTIMIZER,
        "            if zero_grad:\n                self.zero_grad()\n        except BaseException:\n            self._mark_stale()",
        "            if False:\n                self.zero_grad()\n        except BaseException:\n            self._mark_stale()",
        "test_optimizer.py::test_zero_grad_of_the_two_calls",
    ),
    Mutant(
        "second_step leaves fresh gradients",
        OPTIMIZER,
        "state.will_clear = zero_grad",
        "state.will_clear = True",
        "test_closure.py::test_gradients_of_the_last_step_are_stale",
    ),
    Mutant(
        "a failed second_step leaves fresh gradients",
        OPTIMIZER,
        "        except BaseException:\n            self._mark_stale()\n            raise\n        finally:\n            state.will_clear = False",
        "        except BaseException:\n            raise\n        finally:\n            state.will_clear = False",
        "test_corners.py::test_zero_grad_that_raises_in_second_step_leaves_nothing_fresh",
    ),
    Mutant(
        "state initialisation while perturbed",
        OPTIMIZER,
        "if closure is None and not state.perturbed and state.between is None and is_state",
        "if closure is None and is_state",
        "test_checkpoint.py::test_a_step_in_two_calls_is_no_initialisation",
    ),
    Mutant(
        "the base steps at w + e_w",
        OPTIMIZER,
        "        self._restore()\n        self._rehearse()\n        if valid:",
        "        self._rehearse()\n        if valid:",
        "test_optimizer.py::test_weights_move_and_come_back_at_their_addresses",
    ),
    Mutant(
        "a step that trainers skip is taken",
        OPTIMIZER,
        "        if valid:\n",
        "        if True:\n",
        "../frameworks/test_composer.py::test_an_overflow_ends_the_step_at_w",
    ),
    Mutant(
        "steps are not counted",
        OPTIMIZER,
        "        self._count_step(completed)\n        return loss",
        "        return loss",
        "test_interval.py::test_which_steps_are_sam_steps",
    ),
    Mutant(
        "step hooks run twice",
        OPTIMIZER,
        "                    for post_hook in post_hooks:",
        "                    for post_hook in 2 * [*post_hooks]:",
        "test_hooks.py::test_each_hook_runs_once_a_step",
    ),
    Mutant(
        "pre-hooks change nothing",
        OPTIMIZER,
        "args, kwargs = _call_pre_hook(pre_hook, sam, args, kwargs)",
        "_call_pre_hook(pre_hook, sam, args, kwargs)",
        "test_torch_suite.py::test_a_step_pre_hook_may_change_the_arguments",
    ),
    Mutant(
        "an exception leaves w + e_w",
        OPTIMIZER,
        "            except BaseException:\n                sam._restore()\n",
        "            except BaseException:\n",
        "test_closure.py::test_an_exception_marks_stale",
    ),
    Mutant(
        "an exception leaves fresh gradients",
        OPTIMIZER,
        "                sam._restore()\n                sam._mark_stale()\n",
        "                sam._restore()\n",
        "test_closure.py::test_an_exception_marks_stale",
    ),
    Mutant(
        "an exception leaves the scale",
        OPTIMIZER,
        "                amp.clear_scaler_attributes(sam)\n",
        "",
        "test_amp_misuse.py::test_scaler_step_with_a_closure_is_an_error_that_leaves_nothing_behind",
    ),
    Mutant(
        "restore leaves fresh gradients",
        OPTIMIZER,
        "            self._end_between()\n            self._mark_stale()\n\n    def __enter__",
        "            self._end_between()\n\n    def __enter__",
        "test_closure_passes.py::test_what_restore_leaves_is_stale",
    ),
    Mutant(
        "a gradient that is left out is one at w",
        OPTIMIZER,
        "any_fresh(perturbed or self._parameters())",
        "any_fresh(self._parameters())",
        "test_closure_passes.py::test_a_gradient_of_a_group_that_is_left_out_is_not_the_one_at_w",
    ),
    Mutant(
        "where all is left out there is no gradient",
        OPTIMIZER,
        "any_fresh(perturbed or self._parameters())",
        "any_fresh(perturbed)",
        "test_closure_passes.py::test_where_all_groups_are_left_out_theirs_is_the_gradient_of_a_plain_step",
    ),
    Mutant(
        "a run shorter than the interval is told of start",
        MISUSE,
        "        steps < interval\n",
        "        not steps\n",
        "test_start.py::test_one_sam_step_is_enough_and_so_are_fewer_steps_than_the_interval",
    ),
    Mutant(
        "a warning names a line of fastsam",
        "fastsam/notices.py",
        "level, frame = level + 1, frame.f_back",
        "frame = frame.f_back",
        "test_misuse.py::test_a_warning_names_the_line_of_the_loop",
    ),
    Mutant(
        "a warning names a line of torch",
        "fastsam/notices.py",
        '"torch", ',
        "",
        "test_misuse.py::test_a_warning_names_the_line_of_the_loop",
    ),
    Mutant(
        "restore forgets a plain step",
        OPTIMIZER,
        "if state.phase is not Phase.AT_W or state.between is not None:",
        "if state.phase is not Phase.AT_W:",
        "test_interval.py::test_a_batch_that_is_skipped_after_first_step_leaves_nothing",
    ),
    Mutant(
        "restore lets the watch go on",
        OPTIMIZER,
        "            self._end_between()\n            self._mark_stale()\n\n    def __enter__",
        "            self._mark_stale()\n\n    def __enter__",
        "test_misuse.py::test_the_watch_ends_with_the_step",
    ),
    Mutant(
        "with sam leaves w + e_w",
        OPTIMIZER,
        "        self.restore()\n\n    # -- parts",
        "        return\n\n    # -- parts",
        "test_interrupt.py::test_exception_between_perturb_and_restore_leaves_w",
    ),
    Mutant(
        "a lone step steps at w",
        OPTIMIZER,
        "if not state.perturbed and self.is_sam_step and (state.direction.two_passes or state.between is None):",
        "if False:",
        "test_optimizer.py::test_second_step_needs_a_first_step",
    ),
    Mutant(
        "along the momentum the first step fails",
        OPTIMIZER,
        "(state.direction.two_passes or state.between is None):",
        "True:",
        "test_momentum.py::test_against_the_method_by_hand",
    ),
    Mutant(
        "scaler.step(sam, closure) goes on",
        OPTIMIZER,
        "        if amp.in_scaler_step(self):\n            raise",
        "        if False:\n            raise",
        "test_amp_misuse.py::test_scaler_step_with_a_closure_is_an_error_that_leaves_nothing_behind",
    ),
    Mutant(
        "first_pass_context around plain passes",
        OPTIMIZER,
        "        loss = self._call(passes.plain)\n        return loss, not (passes.by_trainer and loss is None)\n\n    def _run_along",
        "        with nullcontext() if self.first_pass_context is None else self.first_pass_context():\n            loss = self._call(passes.plain)\n        return loss, not (passes.by_trainer and loss is None)\n\n    def _run_along",
        "test_interval.py::test_the_first_pass_context_is_not_for_plain_steps",
    ),
    Mutant(
        "a plain step climbs",
        OPTIMIZER,
        "        if not self.is_sam_step and not self._state.perturbed:\n            return self._run_plain(passes)\n",
        "",
        "test_interval.py::test_which_steps_are_sam_steps",
    ),
    Mutant(
        "gradients at w stay in a closure",
        OPTIMIZER,
        "            self._perturb()\n            self.zero_grad()\n",
        "            self._perturb()\n",
        "test_closure.py::test_both_ways_make_the_same_step",
    ),
    Mutant(
        "gradients at w stay along the momentum",
        OPTIMIZER,
        "                self.zero_grad()  # those at w, of a loop that was written for SAM\n",
        "                pass\n",
        "test_momentum.py::test_a_gradient_at_w_is_told",
    ),
    Mutant(
        "along the momentum a doubled gradient goes unseen",
        OPTIMIZER,
        "            state.between = LeftGradients(self._parameters())",
        "            state.between = LeftGradients(self._parameters() if two_passes else [])",
        "test_momentum.py::test_a_gradient_that_is_added_to_the_one_at_w_of_a_plain_step_is_an_error",
    ),
    Mutant(
        "a closure along the momentum keeps the gradients at w of a plain step",
        OPTIMIZER,
        "if climbed or state.between is None or state.between.there:",
        "if climbed:",
        "test_momentum.py::test_a_loop_of_davda54_climbs_along_the_momentum",
    ),
    Mutant(
        "a gradient at w is looked for too late",
        MISUSE,
        "if (climbed or not steps) and",
        "if climbed and",
        "test_momentum.py::test_a_loop_of_davda54_climbs_along_the_momentum",
    ),
    Mutant(
        "restore() in a closure goes unseen",
        OPTIMIZER,
        '        if not self._state.perturbed:\n            raise RuntimeError("restore() was called, by a signal handler, while the closure',
        '        if False:\n            raise RuntimeError("restore() was called, by a signal handler, while the closure',
        "test_signals.py::test_restore_while_a_closure_runs_ends_the_step",
    ),
    Mutant(
        "closure_passes two takes what is there",
        OPTIMIZER,
        'if self.closure_passes == "two":\n            return False',
        "if False:\n            return False",
        "test_closure_passes.py::test_an_attack_before_the_step_two",
    ),
    Mutant(
        "closure_passes one takes anything",
        OPTIMIZER,
        'if not fresh and self.closure_passes == "one":',
        "if False:",
        "test_closure_passes.py::test_one_without_gradients_is_an_error",
    ),
    Mutant(
        "closure_passes one forgets gradients at construction",
        OPTIMIZER,
        'if self.closure_passes != "one":\n            self._mark_stale()',
        "if True:\n            self._mark_stale()",
        "test_closure_passes.py::test_one_takes_gradients_from_before_construction",
    ),
    Mutant(
        "gradients at construction are fresh",
        OPTIMIZER,
        'if self.closure_passes != "one":\n            self._mark_stale()',
        "if False:\n            self._mark_stale()",
        "test_closure_passes.py::test_gradients_from_before_construction_are_stale",
    ),
    Mutant(
        "the notice on closures comes always",
        OPTIMIZER,
        '        if cleared:\n            self.closure_passes = "two"',
        '        if True:\n            self.closure_passes = "two"',
        "test_closure_passes.py::test_gradients_at_w_and_a_closure_for_the_second_pass",
    ),
    Mutant(
        "counted gradients stay fresh",
        OPTIMIZER,
        "        if not self._state.will_clear:\n            self._mark_stale()",
        "        pass",
        "test_closure.py::test_gradients_of_the_last_step_are_stale",
    ),
    Mutant(
        "an unscaled first gradient is taken",
        OPTIMIZER,
        "        amp.check_first_gradient(self.grad_scaler, self, self.base_optimizer)\n",
        "",
        "test_amp_misuse.py::test_unscale_before_first_step_is_an_error_where_the_scaler_is_known",
    ),
    Mutant(
        "no gradient is no error",
        OPTIMIZER,
        "                raise no_gradient_error(self.param_groups)",
        "                return False",
        "test_optimizer.py::test_first_step_needs_a_gradient",
    ),
    Mutant(
        "momentum is not looked at",
        OPTIMIZER,
        "            misuse.check_no_momentum(self.base_optimizer, self._parameters(), self._steps)",
        "            pass",
        "test_momentum.py::test_a_momentum_by_another_name_is_an_error",
    ),
    Mutant(
        "perturb comes before its mark",
        OPTIMIZER,
        "        state.phase = Phase.CLIMBING\n        try:\n            perturbation.perturb()",
        "        try:\n            perturbation.perturb()\n            state.phase = Phase.CLIMBING",
        "test_signals.py::test_random_signals",
    ),
    Mutant(
        "restore() within perturb goes unseen",
        OPTIMIZER,
        "            if state.phase is Phase.INTERRUPTED:\n                raise",
        "            if False:\n                raise",
        "test_signals.py::test_restore_while_perturb_writes_ends_first_step",
    ),
    Mutant(
        "autocast casts survive the ascent",
        OPTIMIZER,
        "        torch.clear_autocast_cache()\n        return True",
        "        return True",
        "test_autocast.py::test_one_autocast_block_around_the_step_uses_the_perturbed_weights",
    ),
    Mutant(
        "autocast casts survive the restore",
        OPTIMIZER,
        "        state.phase = Phase.INTERRUPTED if writing else Phase.AT_W\n        torch.clear_autocast_cache()",
        "        state.phase = Phase.INTERRUPTED if writing else Phase.AT_W",
        "test_autocast.py::test_one_autocast_block_around_the_step_uses_the_perturbed_weights",
    ),
    Mutant(
        "the backup goes at a first signal",
        OPTIMIZER,
        "state.perturbation.restore(again=writing)",
        "state.perturbation.restore(again=False)",
        "test_signals.py::test_random_signals",
    ),
    Mutant(
        "state initialisation at any rate",
        CHECKPOINT,
        "        if lr != 0:\n            return False\n",
        "",
        "test_checkpoint.py::test_what_is_no_initialisation",
    ),
    Mutant(
        "state initialisation with gradients",
        CHECKPOINT,
        "return not any(local(p.grad).any() for p in params if p.grad is not None)",
        "return True",
        "test_checkpoint.py::test_what_is_no_initialisation",
    ),
    Mutant(
        "zero_grad forgives nothing",
        OPTIMIZER,
        "            state.between.forgive()\n",
        "            pass\n",
        "test_misuse.py::test_what_is_no_second_gradient",
    ),
    Mutant(
        "zeros are fresh",
        OPTIMIZER,
        "        if not gone:\n            self._mark_stale()",
        "        if False:\n            self._mark_stale()",
        "test_closure_passes.py::test_a_step_marks_once",
    ),
    Mutant(
        "the base may step at w + e_w",
        OPTIMIZER,
        '        """Returns how many steps are completed where somebody else steps the base optimizer; else None."""\n        if self._state.perturbed:',
        '        """Returns how many steps are completed where somebody else steps the base optimizer; else None."""\n        if False:',
        "test_misuse.py::test_the_base_step_while_perturbed_is_refused",
    ),
    Mutant(
        "the base leaves fresh gradients",
        OPTIMIZER,
        "            self._end_between()\n            self._count_step(completed)\n            self._opt_called",
        "            self._end_between()\n            self._steps = completed + 1\n            self._opt_called",
        "test_closure_passes.py::test_steps_of_the_base_optimizer_in_between",
    ),
    Mutant(
        "add_param_group while perturbed",
        WRAPPER,
        '        self._require_idle("add_param_group()")\n',
        "",
        "test_optimizer.py::test_what_must_wait_while_perturbed",
    ),
    Mutant(
        "a refused group stays",
        WRAPPER,
        "            groups.pop()\n            raise",
        "            raise",
        "test_errors.py::test_options_of_a_group",
    ),
    Mutant(
        "a new group's gradients are fresh",
        WRAPPER,
        '            self._mark_group_stale(groups[-1]["params"])\n',
        "",
        "test_closure_passes.py::test_gradients_of_a_group_that_comes_later_are_stale",
    ),
    Mutant(
        "a new group's gradients are fresh to another FusedSAM",
        OPTIMIZER,
        "for sam in misuse.around(self.base_optimizer):",
        "for sam in [self]:",
        "test_closure_passes.py::test_gradients_of_a_group_that_comes_later_are_stale",
    ),
    Mutant(
        "a count that was loaded goes with the groups",
        WRAPPER,
        "        self._steps = self._steps  # the same",
        "        # the same",
        "test_corners.py::test_a_count_that_was_saved_of_one_group_is_loaded_into_each",
    ),
    Mutant(
        "first_step in the closure climbs again",
        OPTIMIZER,
        "if self._state.perturbed:  # w + e_w would be saved as w",
        "if False:",
        "test_closure.py::test_first_step_in_the_closure_is_an_error",
    ),
    Mutant(
        "inference mode is not left",
        "fastsam/torch_api.py",
        "if torch.is_inference_mode_enabled():",
        "if False:",
        "test_corners.py::test_calls_in_inference_mode",
    ),
    Mutant(
        "a new group is not flattened",
        WRAPPER,
        "            if self.flatten_parameters:\n                flatten_groups(groups, len(groups) - 1)\n",
        "",
        "test_flatten.py::test_across_groups_and_in_later_ones",
    ),
    Mutant(
        "a new group is not checked",
        WRAPPER,
        "            check_group(groups, len(groups) - 1)\n",
        "",
        "test_errors.py::test_options_of_a_group",
    ),
    Mutant(
        "state_dict while perturbed",
        WRAPPER,
        '        self._require_idle("state_dict()")\n',
        "",
        "test_optimizer.py::test_what_must_wait_while_perturbed",
    ),
    Mutant(
        "load_state_dict while perturbed",
        WRAPPER,
        '        self._require_idle("load_state_dict()")\n',
        "",
        "test_optimizer.py::test_what_must_wait_while_perturbed",
    ),
    Mutant(
        "load_state_dict writes to its argument",
        WRAPPER,
        "state_dict = state_dict.copy()  # hooks may write to it",
        "pass",
        "test_torch_suite.py::test_a_load_hook_that_writes_leaves_the_callers_state_dict",
    ),
    Mutant(
        "a bad option of a state dict is loaded",
        WRAPPER,
        '            check_options({**options, **saved}, f" of param group {i} of the state dict")',
        "            pass",
        "test_checkpoint.py::test_a_state_dict_that_does_not_fit_changes_nothing",
    ),
    Mutant(
        "rho loses its identity",
        WRAPPER,
        'group["rho"] = rho.copy_(torch.as_tensor(group["rho"]))',
        'group["rho"] = torch.as_tensor(group["rho"])',
        "test_checkpoint.py::test_tensor_rho_keeps_its_identity",
    ),
    Mutant(
        "plain state dicts lose the options",
        WRAPPER,
        "            for key, value in options.items():\n                group.setdefault(key, value)\n",
        "",
        "test_checkpoint.py::test_plain_state_dicts_both_ways",
    ),
    Mutant(
        "load hooks change nothing",
        WRAPPER,
        "state_dict = or_default(pre_hook(self, state_dict), state_dict)",
        "pre_hook(self, state_dict)",
        "test_torch_suite.py::test_state_dict_and_load_hooks",
    ),
    Mutant(
        "options as attributes leave the groups",
        WRAPPER,
        "            group[name] = value",
        "            pass",
        "test_api.py::test_rho_may_be_a_tensor_of_one_element",
    ),
    Mutant(
        "options as attributes leave the defaults",
        WRAPPER,
        "self.defaults[name] = value = OPTIONS[name](value, name)",
        "value = OPTIONS[name](value, name)",
        "test_api.py::test_options_are_attributes_of_all_groups",
    ),
    Mutant(
        "an option that differs is the first's",
        WRAPPER,
        "if any(value is not values[0] and value != values[0] for value in values):",
        "if False:",
        "test_api.py::test_options_that_differ_have_no_one_value",
    ),
    Mutant(
        "interval is not checked",
        WRAPPER,
        'SETTINGS["interval"](interval, "interval")',
        "interval",
        "test_api.py::test_options_are_checked_when_they_are_set",
    ),
    Mutant(
        "start is not checked",
        WRAPPER,
        'SETTINGS["start"](start, "start")',
        "start",
        "test_start.py::test_it_is_a_number_of_steps",
    ),
    Mutant(
        "pickle while perturbed",
        WRAPPER,
        '        self._require_idle("pickle and deepcopy")\n',
        "",
        "test_optimizer.py::test_what_must_wait_while_perturbed",
    ),
    Mutant(
        "a pickle forgets what it lost",
        WRAPPER,
        '"_lost": lost}',
        '"_lost": ()}',
        "test_checkpoint.py::test_pickle_leaves_the_scaler_behind_and_a_closure_step_says_so",
    ),
    Mutant(
        "a deepcopy loses the scaler",
        WRAPPER,
        '"_of_training": dict(self._of_training), ',
        "",
        "test_checkpoint.py::test_deepcopy_shares_the_scaler_and_the_context",
    ),
    Mutant(
        "a base's train() while perturbed",
        WRAPPER,
        '        self._require_idle(f"{name}()")\n',
        "",
        "test_api.py::test_train_and_eval_reach_a_base_optimizer_that_has_them",
    ),
    Mutant(
        "left perturbed: any FusedSAM",
        MISUSE,
        "return [other for other in perturbed if any(id(p) in ids for p in other._parameters())]",
        "return perturbed",
        "test_misuse.py::test_many_are_built_in_threads_while_others_step",
    ),
    Mutant(
        "left perturbed stays so",
        MISUSE,
        '        restore_unfinished(other._state, "an earlier FusedSAM had been left")',
        "        pass",
        "test_misuse.py::test_a_new_one_restores_what_an_earlier_one_left_perturbed",
    ),
    Mutant(
        "collected: overwrites what was written",
        PERTURBATION,
        "                if p._version != version\n",
        "                if False\n",
        "test_misuse.py::test_what_was_loaded_since_stays",
    ),
    Mutant(
        "collected: stays at w + e_w",
        MISUSE,
        "    written = state.perturbation.restore_unwritten()",
        "    written = False",
        "test_misuse.py::test_a_new_one_restores_what_an_earlier_one_left_perturbed",
    ),
    Mutant(
        "a doubled gradient goes unseen",
        MISUSE,
        "if left is not None and left.added_to and not perturbed:",
        "if False:",
        "test_misuse.py::test_a_second_gradient_on_a_plain_step_is_an_error",
    ),
    Mutant(
        "no second gradient goes unsaid",
        MISUSE,
        '        tell_once(\n            "no second gradient"',
        '        str(\n            "no second gradient"',
        "test_misuse.py::test_a_forgotten_second_backward_is_told_once",
    ),
    Mutant(
        "a lost scaler goes unseen",
        MISUSE,
        'if "grad_scaler" in lost:',
        "if False:",
        "test_checkpoint.py::test_pickle_leaves_the_scaler_behind_and_a_closure_step_says_so",
    ),
    Mutant(
        "a lost context goes unsaid",
        MISUSE,
        'if "first_pass_context" in lost:',
        "if False:",
        "test_checkpoint.py::test_pickle_leaves_the_context_behind_and_a_closure_step_says_so_once",
    ),
    Mutant(
        "a gradient at w along the momentum goes unsaid",
        MISUSE,
        "if (climbed or not steps) and state.stale.any_fresh(params()):",
        "if False:",
        "test_momentum.py::test_a_gradient_at_w_is_told",
    ),
    Mutant(
        "no momentum after some steps goes unsaid",
        MISUSE,
        "    if steps > 0:\n",
        "    if False:\n",
        "test_momentum.py::test_no_momentum_after_steps_is_told",
    ),
    Mutant(
        "other state than momentum goes unseen",
        MISUSE,
        "if keeps_other_state(base, params):",
        "if False:",
        "test_momentum.py::test_a_momentum_by_another_name_is_an_error",
    ),
    Mutant(
        "fresh: by the object alone",
        FRESHNESS,
        "any(getattr(g, self._name, None) != _version(g)",
        "any(getattr(g, self._name, None) is None",
        "test_closure.py::test_accumulation_onto_stale_gradients_makes_them_fresh",
    ),
    Mutant(
        "fresh: one mark for all optimizers",
        FRESHNESS,
        'self._name = f"_fastsam_{secrets.token_hex(8)}"',
        'self._name = "_fastsam"',
        "test_closure_passes.py::test_marks_are_one_optimizers_own",
    ),
    Mutant(
        "a plain step sees other gradients",
        FRESHNESS,
        "            if p.grad is g and _version(g) == version + 1:",
        "            if True:",
        "test_misuse.py::test_what_is_no_second_gradient",
    ),
    Mutant(
        "zeros that were written in between are no clearing",
        FRESHNESS,
        "if p.grad is g and _version(g) == version + 1:",
        "if p.grad is g:",
        "test_misuse.py::test_what_is_no_second_gradient",
    ),
    Mutant(
        "gradients that first_step left stay for the closure",
        OPTIMIZER,
        "elif self._state.between is not None and self._state.between.there:",
        "elif False:",
        "test_closure.py::test_after_first_step_too_the_gradients_at_w_are_cleared",
    ),
    Mutant(
        "a closure after first_step clears what came since",
        OPTIMIZER,
        "elif self._state.between is not None and self._state.between.there:",
        "else:",
        "test_closure.py::test_after_first_step_too_the_gradients_at_w_are_cleared",
    ),
    Mutant(
        "a plain step is not forgiven",
        FRESHNESS,
        "        self._left = []\n        self.added_to = False",
        "        self._left = []",
        "test_misuse.py::test_what_is_no_second_gradient",
    ),
    Mutant(
        "a plain step is watched for ever",
        FRESHNESS,
        "        if self._handle is not None:\n            self._handle.remove()",
        "        pass",
        "test_misuse.py::test_the_watch_ends_with_the_step",
    ),
    Mutant(
        "a stand-in stays",
        FRESHNESS,
        "                self._p.grad = None\n        return self.cleared",
        "                pass\n        return self.cleared",
        "test_closure_passes.py::test_the_stand_in_is_no_gradient",
    ),
    Mutant(
        "no stand-in",
        FRESHNESS,
        "            self._zeros = had_grad.grad = torch.zeros_like(had_grad)",
        "            pass",
        "test_closure_passes.py::test_an_attack_before_the_step_is_the_ascent_and_auto_says_so",
    ),
    Mutant(
        "a copy's step marks the original's",
        HOOKS,
        "self._found = method() if method is not None and optimizer is self._base() else None",
        "self._found = method() if method is not None else None",
        "test_hooks.py::test_a_copy_that_brings_its_hooks_steps_its_own",
    ),
    Mutant(
        "hooks of a patched step: not before",
        HOOKS,
        "        for around in self.around:\n            around.before(base)\n",
        "",
        "test_hooks.py::test_two_around_one_base_count_each_step_once",
    ),
    Mutant(
        "hooks of a patched step: not after",
        HOOKS,
        "        for around in self.around:\n            around.after()\n",
        "",
        "test_hooks.py::test_two_around_one_base_count_each_step_once",
    ),
    Mutant(
        "zero_grad of a copy clears the original",
        HOOKS,
        '        return getattr, (self._base(), "zero_grad")',
        "        return object.__reduce__(self)",
        "test_hooks.py::test_a_copy_clears_and_steps_its_own",
    ),
    Mutant(
        "zero_grad of somebody else is lost",
        HOOKS,
        "        if self._own is not None:\n            self._own(*args, **kwargs)\n        elif",
        "        if",
        "test_hooks.py::test_a_zero_grad_of_somebody_elses_is_still_called",
    ),
    Mutant(
        "zero_grad: zeros count as gone",
        HOOKS,
        "mark(bool(lets_go))",
        "mark(True)",
        "test_closure_passes.py::test_a_step_marks_once",
    ),
    Mutant(
        "zero_grad lets go where zeros were asked for",
        HOOKS,
        '(args[0] if args else kwargs.get("set_to_none", True))',
        "(args[0] if args else True)",
        "test_optimizer.py::test_zero_grad_clears_or_writes_zeros",
    ),
    Mutant(
        "unscaled on sam goes unseen",
        AMP,
        "if _is_unscaled(scaler, sam) or _is_unscaled(scaler, base):",
        "if _is_unscaled(scaler, base):",
        "test_amp_misuse.py::test_unscale_before_first_step_is_an_error_where_the_scaler_is_known",
    ),
    Mutant(
        "unscaled on the base goes unseen",
        AMP,
        "if _is_unscaled(scaler, sam) or _is_unscaled(scaler, base):",
        "if _is_unscaled(scaler, sam):",
        "test_amp_misuse.py::test_unscale_of_the_base_optimizer_is_an_error_where_the_scaler_is_known",
    ),
    Mutant(
        "unscaled on the base at the end goes unseen",
        AMP,
        '    if _is_unscaled(scaler, base):\n        raise RuntimeError("scaler.unscale_() was called on the base',
        '    if False:\n        raise RuntimeError("scaler.unscale_() was called on the base',
        "test_amp_misuse.py::test_unscale_of_the_base_optimizer_is_an_error_where_the_scaler_is_known",
    ),
    Mutant(
        "the scale is not copied",
        AMP,
        "return None if scale is None else scale.clone()",
        "return scale",
        "test_amp.py::test_grad_norm_is_without_the_scale_where_it_is_known",
    ),
    Mutant(
        "a scheduler's step is lost",
        AMP,
        "    if own is not None:\n            sam.step = own",
        "    if False:\n            sam.step = own",
        "test_amp.py::test_scheduler_warns_of_nothing_when_the_scaler_skips_the_first_step",
    ),
    Mutant(
        "sam.step stays replaced",
        AMP,
        "    finally:\n        del sam.step\n",
        "    finally:\n        pass\n",
        "test_amp.py::test_training_equals_plain_torch",
    ),
    Mutant(
        "fused bases keep the scale",
        AMP,
        "        finally:\n            clear_scaler_attributes(base)",
        "        finally:\n            pass",
        "test_amp.py::test_training_equals_plain_torch",
    ),
    Mutant(
        "an infinite second gradient is stepped by",
        AMP,
        "    elif not found_inf:",
        "    elif True:",
        "test_amp.py::test_training_equals_plain_torch",
    ),
    Mutant(
        "gradients keep the scale",
        AMP,
        "        if grad_scale is not None:\n            _unscale(base, grad_scale)\n        base.step()",
        "        base.step()",
        "test_amp.py::test_training_equals_plain_torch",
    ),
    Mutant(
        "gradients are unscaled in place",
        AMP,
        "unscaled = torch._foreach_mul([g for _, g in pairs], inverse.to(device, non_blocking=True))",
        "unscaled = [g.mul_(inverse.to(device)) for _, g in pairs]",
        "test_amp.py::test_gradients_that_share_memory_are_unscaled_once",
    ),
    Mutant(
        "fp16 gradients are unscaled",
        AMP,
        "        if g.dtype is torch.float16:",
        "        if False:",
        "test_amp_misuse.py::test_fp16_gradients_are_refused_unless_the_base_optimizer_unscales_them",
    ),
    Mutant(
        "grad_scaler is not checked",
        OPTIONS,
        "    if value is not None and not isinstance(value, GradScaler):",
        "    if False:",
        "test_amp_misuse.py::test_wrong_grad_scaler_is_a_type_error",
    ),
    Mutant(
        "what davda54 kept is loaded",
        CHECKPOINT,
        'FOREIGN_STATE = ("old_p", "e_w")',
        "FOREIGN_STATE = ()",
        "test_checkpoint.py::test_state_dict_of_pytorch_optimizers_sam",
    ),
    Mutant(
        "what Composer kept is loaded",
        CHECKPOINT,
        'FOREIGN_STATE = ("old_p", "e_w")',
        'FOREIGN_STATE = ("old_p",)',
        "test_checkpoint.py::test_state_dict_of_davda54_or_composer",
    ),
    Mutant(
        "empty entries are loaded",
        CHECKPOINT,
        "        if kept or not entry:\n            state[key] = kept",
        "        state[key] = kept",
        "test_checkpoint.py::test_state_dict_of_davda54_or_composer",
    ),
    Mutant(
        "a layout of the base's own is looked into",
        CHECKPOINT,
        '    if not isinstance(base.get("state"), dict):',
        "    if False:",
        "test_checkpoint.py::test_state_dicts_of_another_layout",
    ),
    Mutant(
        "another order of groups is known",
        PERTURBATION,
        "not self._same_parameters(groups)\n            or process_group",
        "process_group",
        "test_optimizer.py::test_weights_move_and_come_back_at_their_addresses",
    ),
    Mutant(
        "as many parameters are the same ones",
        PERTURBATION,
        "len(known) == len(params) and all(map(is_, known, params)) for known",
        "len(known) == len(params) for known",
        "test_moving.py::test_other_parameters_in_a_group",
    ),
    Mutant(
        "moved parameters are not looked for",
        PERTURBATION,
        "            or any(bucket.moved() for _, bucket in self.buckets)\n",
        "",
        "test_moving.py::test_between_steps",
    ),
    Mutant(
        "a late gradient is not looked for",
        PERTURBATION,
        "            or any(g is not None for g in map(self.direction.of, self._slotless))\n",
        "",
        "test_optimizer.py::test_first_step_needs_a_gradient",
    ),
    Mutant(
        "a failed measure is kept",
        PERTURBATION,
        "        for _, bucket in self.buckets:\n            bucket.release()\n\n    def restore",
        "        pass\n\n    def restore",
        "test_corners.py::test_failed_ascent_holds_no_gradient",
    ),
    Mutant(
        "restores by old addresses",
        PERTURBATION,
        "elif bucket.restorable():",
        "elif True:",
        "test_moving.py::test_while_perturbed",
    ),
    Mutant(
        "restores into what moved alone",
        PERTURBATION,
        "            elif bucket.restorable():\n                backend.restore(bucket)\n                bucket.unstage()\n            else:\n",
        "            else:\n",
        "test_moving.py::test_a_square_weight_that_is_transposed_in_place",
    ),
    Mutant(
        "changed options wait",
        PERTURBATION,
        "if not on_device and options == self._options:",
        "if self._options is not None:",
        "test_optimizer.py::test_rho_can_be_scheduled",
    ),
    Mutant(
        "climbs along the momentum",
        DIRECTION,
        '"momentum",\n        lambda group: -1.0,',
        '"momentum",\n        lambda group: 1.0,',
        "test_momentum.py::test_against_the_method_by_hand",
    ),
    Mutant(
        "options are not checked in a step",
        PERTURBATION,
        '            check_options(group, f" of param group {i}")',
        "            pass",
        "test_errors.py::test_options_that_go_wrong_while_training",
    ),
    Mutant(
        "rehearsal: no memory is asked for",
        PERTURBATION,
        "        backups = [bucket.allocate_backup() for _, bucket in trial.buckets]\n        self.rehearsed = bool(backups)",
        "        self.rehearsed = bool(trial.buckets)",
        "test_start.py::test_the_memory_of_a_backup_is_met_too",
    ),
    Mutant(
        "rehearsal: gradients are not looked at",
        PERTURBATION,
        "                bucket.gather()\n        backups",
        "                pass\n        backups",
        "test_start.py::test_the_first_plain_step_refuses_what_a_sam_step_would",
    ),
    Mutant(
        "16 bits go unsaid",
        PERTURBATION,
        "        if short and not self._warned:",
        "        if False:",
        "test_optimizer.py::test_16_bit_parameters_warn_once",
    ),
    Mutant(
        "16 bits are said always",
        PERTURBATION,
        "            self._warned = True\n            warn(",
        "            warn(",
        "test_optimizer.py::test_16_bit_parameters_warn_once",
    ),
    Mutant(
        "an option given is what was left over",
        ARGUMENTS,
        "[{**group, **wins} if COUNTER in group else group for group in groups]",
        "groups",
        "test_api.py::test_given_options_win_over_left_over_ones",
    ),
    Mutant(
        "what is replaced goes unsaid",
        ARGUMENTS,
        "    if replaced:\n",
        "    if False:\n",
        "test_api.py::test_given_options_win_over_left_over_ones",
    ),
    Mutant(
        "what is kept goes unsaid",
        ARGUMENTS,
        "    if kept:\n",
        "    if False:\n",
        "test_api.py::test_options_that_an_earlier_one_left_stay_and_it_says_so_once",
    ),
    Mutant(
        "what is refused leaves its options",
        OPTIONS,
        "complete_group(dict(group), options, steps) for group in groups",
        "complete_group(group, options, steps) for group in groups",
        "test_api.py::test_a_call_that_was_refused_leaves_no_options",
    ),
    Mutant(
        "complex parameters are refused where they are left out",
        OPTIONS,
        'if p.requires_grad and groups[i]["perturb"]:',
        "if p.requires_grad:",
        "test_perturb.py::test_complex_parameters_may_be_left_out",
    ),
    Mutant(
        "a step that needs its closure is taken",
        ARGUMENTS,
        "    if needed:\n",
        "    if False:\n",
        "test_errors.py::test_base_optimizers_whose_step_needs_an_argument",
    ),
    Mutant(
        "a shallow copy copies the base",
        WRAPPER,
        "return self._fill(type(self).__new__(type(self)), self.__getstate__())",
        "return copy.deepcopy(self)",
        "test_checkpoint.py::test_a_shallow_copy_is_another_one_around_the_same_base",
    ),
    Mutant(
        "a base that is loaded loses the options",
        WRAPPER,
        "        around_load(self.base_optimizer, self._own_options, self._keep_options)\n",
        "",
        "test_checkpoint.py::test_a_state_dict_loaded_past_fused_sam_keeps_the_options_that_it_lacks",
    ),
    Mutant(
        "a copy brings the hooks' FusedSAM along",
        HOOKS,
        "        return dict.fromkeys(vars(self), _nobody)",
        "        return vars(self)",
        "test_hooks.py::test_a_copy_that_brings_its_hooks_steps_its_own",
    ),
    Mutant(
        "frozen parameters have momentum",
        DIRECTION,
        "if not state or not p.requires_grad:",
        "if not state:",
        "test_momentum.py::test_frozen_parameters_stay",
    ),
    Mutant(
        "the state makes an entry",
        DIRECTION,
        "state = base.state.get(p)  # not [p], which would make an entry",
        "state = base.state[p]",
        "test_momentum.py::test_looking_for_the_momentum_makes_no_state",
    ),
    Mutant(
        "maximizing climbs to the best point",
        DIRECTION,
        '-1.0 if group.get("maximize") else 1.0',
        "1.0",
        "test_momentum.py::test_each_group_climbs_by_its_own_sign",
    ),
    Mutant(
        "a shared parameter is perturbed twice",
        OPTIMIZER,
        "        misuse.check_shared(self)\n",
        "",
        "test_misuse.py::test_one_of_shared_parameters_waits_until_the_other_has_ended",
    ),
    Mutant(
        "a base's own step is not counted",
        OPTIMIZER,
        "        if completed is not None:\n            self._end_between()",
        "        if False:\n            self._end_between()",
        "test_misuse.py::test_restore_and_the_base_step_are_a_step",
    ),
    Mutant(
        "the end of what is between",
        OPTIMIZER,
        "            self._end_between()\n            self._count_step(completed)\n",
        "            self._count_step(completed)\n",
        "test_misuse.py::test_the_watch_ends_with_the_step",
    ),
    Mutant(
        "the count restarts with the groups",
        WRAPPER,
        '        return int(self._settings["steps"])',
        "        return 0",
        "test_corners.py::test_groups_that_are_taken_out_and_added_again_keep_their_options_and_the_count",
    ),
    Mutant(
        "new groups restart the count",
        WRAPPER,
        'default=self._settings["steps"])',
        "default=0)",
        "test_corners.py::test_groups_that_were_replaced_past_fused_sam_go_on_with_the_count",
    ),
    Mutant(
        "an option is set in a group that came past as the user's own",
        WRAPPER,
        "        self._complete_groups()  # a group that came past this class would count as the user's own options\n",
        "",
        "test_corners.py::test_an_option_that_is_set_is_one_of_fused_sams_in_a_group_that_came_past_too",
    ),
    Mutant(
        "each group counts for itself",
        WRAPPER,
        "        for group in self.param_groups:\n            group[COUNTER] = steps",
        "        for group in self.param_groups[:1]:\n            group[COUNTER] = steps",
        "test_interval.py::test_a_group_that_comes_later_keeps_the_count",
    ),
    Mutant(
        "hooks stay for ever",
        HOOKS,
        "            weakref.finalize(around.sam, handle.remove).atexit = False",
        "            pass",
        "test_hooks.py::test_wrapping_a_base_again_and_again",
    ),
    Mutant(
        "zero_grad is patched again and again",
        HOOKS,
        "    if not isinstance(patch, _ZeroGrad):",
        "    if True:",
        "test_hooks.py::test_wrapping_a_base_again_and_again",
    ),
    Mutant(
        "odd gradients are none",
        DISTRIBUTED,
        '    raise TypeError(\n        f"the {name} is a',
        '    return None\n    raise TypeError(\n        f"the {name} is a',
        "test_errors.py::test_a_gradient_that_cant_be_read",
    ),
    Mutant(
        "hooks see the loss scale",
        AMP,
        "            _unscale(base, grad_scale)\n            sam.grad_scale = None",
        "            pass",
        "test_amp_misuse.py::test_hooks_see_what_those_of_a_plain_optimizer_see",
    ),
    Mutant(
        "hooks run on a step that is skipped",
        OPTIMIZER,
        "                            pre_hooks = post_hooks = ()",
        "                            pass",
        "test_amp.py::test_training_equals_plain_torch",
    ),
    Mutant(
        "versions are not taken",
        PERTURBATION,
        "        self._versions = [[p._version for p in bucket.live_params()] for _, bucket in self.buckets]",
        "        self._versions = [[p._version - 1 for p in bucket.live_params()] for _, bucket in self.buckets]",
        "test_misuse.py::test_a_forgotten_second_backward_is_told_once",
    ),
    Mutant(
        "closures stay in doubt",
        OPTIMIZER,
        '            self.closure_passes = "two"\n            tell_once',
        "            tell_once",
        "test_closure_passes.py::test_an_attack_before_the_step_is_the_ascent_and_auto_says_so",
    ),
    Mutant(
        "moved: by the address alone",
        PLACES,
        " or _layouts(tensors) != self._layouts",
        "",
        "test_moving.py::test_a_square_weight_that_is_transposed_in_place",
    ),
    Mutant(
        "any attribute of the base is called",
        WRAPPER,
        'if name in ("train", "eval") and hasattr(base, name):',
        "if hasattr(base, name):",
        "test_api.py::test_train_and_eval_reach_a_base_optimizer_that_has_them",
    ),
    Mutant(
        "every base has train()",
        WRAPPER,
        'if name in ("train", "eval") and hasattr(base, name):',
        'if name in ("train", "eval"):',
        "test_api.py::test_train_and_eval_are_not_there_otherwise",
    ),
    Mutant(
        "zero_grad always passes its argument",
        WRAPPER,
        "        if set_to_none:\n            self.base_optimizer.zero_grad()  # some optimizers take no argument\n        else:\n            self.base_optimizer.zero_grad(set_to_none=False)\n",
        "        self.base_optimizer.zero_grad(set_to_none=set_to_none)\n",
        "test_corners.py::test_base_whose_zero_grad_takes_no_argument",
    ),
    Mutant(
        "closure_passes may be set along the momentum",
        WRAPPER,
        '        if self.direction == "momentum":\n            check_one_pass(closure_passes, None)\n',
        "",
        "test_momentum.py::test_options_that_contradict_later",
    ),
    Mutant(
        "closure_passes is not checked when it is set",
        WRAPPER,
        'closure_passes = SETTINGS["closure_passes"](closure_passes, "closure_passes")',
        "pass",
        "test_closure_passes.py::test_an_unknown_word_is_an_error",
    ),
    Mutant(
        "what belongs to the training is not checked",
        WRAPPER,
        "UNPICKLED[name](value, name)",
        "value",
        "test_api.py::test_options_are_checked_when_they_are_set",
    ),
    Mutant(
        "what is set again stays lost",
        WRAPPER,
        "        self._lost.discard(name)\n",
        "",
        "test_checkpoint.py::test_pickle_leaves_the_scaler_behind_and_a_closure_step_says_so",
    ),
    Mutant(
        "options on a device are compared",
        WRAPPER,
        "value is not values[0] and value != values[0]",
        "value != values[0]",
        "test_api.py::test_a_rho_on_a_device_is_not_looked_at",
    ),
    Mutant(
        "add_param_group completes the caller's dict",
        WRAPPER,
        "dict(param_group)",
        "param_group",
        "test_moving.py::test_add_param_group_after_steps",
    ),
    Mutant(
        "a group that came past brings fresh gradients",
        WRAPPER,
        '                if COUNTER not in group:\n                    self._mark_group_stale(group["params"])\n',
        "",
        "test_closure_passes.py::test_gradients_of_a_group_that_comes_later_are_stale",
    ),
    Mutant(
        "a group that came past is not checked",
        WRAPPER,
        "            complete = complete_groups(groups, {key: self.defaults[key] for key in OPTIONS}, steps)\n",
        "            complete = [complete_group(dict(g), self.defaults, steps) for g in groups]\n",
        "test_errors.py::test_a_parameter_that_came_past_the_class_is_checked",
    ),
    Mutant(
        "the count of groups that came past",
        WRAPPER,
        "            if COUNTER not in groups[0]:\n                self._complete_groups()\n",
        "",
        "test_corners.py::test_groups_that_were_replaced_past_fused_sam_go_on_with_the_count",
    ),
    Mutant(
        "a group that came past is saved as it is",
        WRAPPER,
        "        self._complete_groups()  # a group that came past this class is saved with the same count as the others\n",
        "",
        "test_corners.py::test_a_group_that_came_past_the_class_is_saved_with_the_count_of_the_others",
    ),
    Mutant(
        "hooks before state_dict are not run",
        WRAPPER,
        "            pre_hook(self)\n        state_dict = with",
        "            pass\n        state_dict = with",
        "test_torch_suite.py::test_state_dict_and_load_hooks",
    ),
    Mutant(
        "hooks after state_dict change nothing",
        WRAPPER,
        "state_dict = or_default(post_hook(self, state_dict), state_dict)",
        "post_hook(self, state_dict)",
        "test_torch_suite.py::test_state_dict_and_load_hooks",
    ),
    Mutant(
        "hooks after loading are not run",
        WRAPPER,
        "            post_hook(self)\n",
        "            pass\n",
        "test_torch_suite.py::test_state_dict_and_load_hooks",
    ),
    Mutant(
        "a hook that returns nothing empties the dict",
        WRAPPER,
        "return default if result is None else result",
        "return result",
        "test_torch_suite.py::test_a_load_hook_that_writes_leaves_the_callers_state_dict",
    ),
    Mutant(
        "what came past is not complete when loading",
        WRAPPER,
        "        self._complete_groups()\n        check_settings(",
        "        check_settings(",
        "test_checkpoint.py::test_a_plain_state_dict_for_a_group_that_came_past_fused_sam",
    ),
    Mutant(
        "other settings go unsaid",
        WRAPPER,
        "        check_settings(state_dict, self._settings)\n",
        "",
        "test_checkpoint.py::test_a_checkpoint_of_other_settings_is_told_once",
    ),
    Mutant(
        "saved options are checked alone",
        WRAPPER,
        "check_options({**options, **saved},",
        "check_options(saved,",
        "test_checkpoint.py::test_plain_state_dicts_both_ways",
    ),
    Mutant(
        "a tensor rho wants a saved one",
        WRAPPER,
        'isinstance(rho := options.get("rho"), Tensor) and "rho" in group',
        'isinstance(rho := options.get("rho"), Tensor)',
        "test_checkpoint.py::test_tensor_rho_keeps_its_identity",
    ),
    Mutant(
        "what nobody gave is lost",
        WRAPPER,
        "if value is not None}",
        "}",
        "test_checkpoint.py::test_copies_train_on_by_themselves",
    ),
    Mutant(
        "a disabled scaler is missed",
        WRAPPER,
        '        if self.grad_scaler is not None and not self.grad_scaler.is_enabled():\n            there.remove("grad_scaler")\n',
        "",
        "test_checkpoint.py::test_a_disabled_scaler_is_not_missed",
    ),
    Mutant(
        "a pickle from before an option",
        WRAPPER,
        '{**GROUP_DEFAULTS, **options, **state["defaults"]}',
        'state["defaults"]',
        "test_checkpoint.py::test_pickles_from_before_an_option",
    ),
    Mutant(
        "a pickle from before a setting",
        WRAPPER,
        '{**{name: defaults[name] for name in SETTINGS}, "steps": 0, **state["_settings"]}',
        '{"steps": 0, **state["_settings"]}',
        "test_checkpoint.py::test_pickles_from_before_an_option",
    ),
    Mutant(
        "the count that the groups bring",
        WRAPPER,
        '        self._settings["steps"] = self._steps\n',
        "",
        "test_corners.py::test_groups_that_are_taken_out_and_added_again_keep_their_options_and_the_count",
    ),
    Mutant(
        "a deepcopy forgets what it lost",
        WRAPPER,
        '"_lost": self._lost}',
        '"_lost": ()}',
        "test_checkpoint.py::test_pickle_leaves_the_scaler_behind_and_a_closure_step_says_so",
    ),
    Mutant(
        "a deepcopy lost what it shares",
        WRAPPER,
        ', "_lost": self._lost}',
        "}",
        "test_checkpoint.py::test_deepcopy_shares_the_scaler_and_the_context",
    ),
    Mutant(
        "a deepcopy's scaler is the original's",
        WRAPPER,
        "dict(self._of_training)",
        "self._of_training",
        "test_checkpoint.py::test_deepcopy_shares_the_scaler_and_the_context",
    ),
    Mutant(
        "a disabled scaler has a scale",
        AMP,
        "scale_of(scaler) if scaler is not None and scaler.is_enabled() else None",
        "scale_of(scaler) if scaler is not None else None",
        "test_amp.py::test_disabled_scaler_is_no_scaler",
    ),
    Mutant(
        "the scaler that stepped is forgotten",
        AMP,
        "    scaler = scaler or _stepped_by.get(sam)\n",
        "",
        "test_amp_misuse.py::test_unscale_before_first_step_where_the_scaler_is_not_known",
    ),
    Mutant(
        "hooks run where a gradient is infinite",
        AMP,
        "        if found_inf:\n            return False\n",
        "",
        "test_amp_misuse.py::test_hooks_see_what_those_of_a_plain_optimizer_see",
    ),
    Mutant(
        "hooks want a scale",
        AMP,
        "        if grad_scale is not None:\n            _unscale(base, grad_scale)\n            sam",
        "        if True:\n            _unscale(base, grad_scale)\n            sam",
        "test_amp_misuse.py::test_hooks_see_what_the_user_has_unscaled",
    ),
    Mutant(
        "hooks unscale again",
        AMP,
        "        if not is_unscaled(scaler, sam):\n",
        "        if True:\n",
        "test_amp_misuse.py::test_hooks_see_what_the_user_has_unscaled",
    ),
    Mutant(
        "a known scaler that steps is asked to step",
        AMP,
        "    if scaler is None or in_scaler_step(sam):\n",
        "    if scaler is None:\n",
        "test_amp.py::test_infinite_second_gradient_changes_nothing_but_the_scale",
    ),
    Mutant(
        "what is unscaled is unscaled by nothing",
        AMP,
        "        if grad_scale is not None:\n            _unscale(base, grad_scale)\n        base.step()",
        "        _unscale(base, grad_scale)\n        base.step()",
        "test_amp.py::test_clipping_after_unscale",
    ),
    Mutant(
        "the older contract of scaling",
        AMP,
        'return supports and "grad_scaler" not in inspect.signature(base.step).parameters',
        "return supports",
        "test_amp.py::test_a_base_that_asks_for_the_scaler_is_given_unscaled_gradients",
    ),
    Mutant(
        "a parameter without gradient is unscaled",
        AMP,
        "        if (g := p.grad) is None:\n            continue\n",
        "        g = p.grad\n",
        "test_amp.py::test_gradients_that_share_memory_are_unscaled_once",
    ),
    Mutant(
        "entries of state are dicts",
        CHECKPOINT,
        " if isinstance(entry, dict) else entry",
        "",
        "test_checkpoint.py::test_state_dict_of_davda54_or_composer",
    ),
    Mutant(
        "the base is given FusedSAM's settings",
        CHECKPOINT,
        " if key != SETTINGS_KEY}",
        "}",
        "test_checkpoint.py::test_state_dicts_of_another_layout",
    ),
    Mutant(
        "all checkpoints have settings",
        CHECKPOINT,
        "state_dict.get(SETTINGS_KEY, {})",
        "state_dict[SETTINGS_KEY]",
        "test_checkpoint.py::test_plain_state_dicts_both_ways",
    ),
    Mutant(
        "checkpoints have all settings",
        CHECKPOINT,
        "if name in saved and saved[name] != settings[name]",
        "if saved.get(name) != settings[name]",
        "test_checkpoint.py::test_plain_state_dicts_both_ways",
    ),
    Mutant(
        "state initialisation of what has state",
        CHECKPOINT,
        "    if optimizer.state:\n        return False\n",
        "",
        "test_checkpoint.py::test_a_plain_step_at_lr_0_reads_no_gradient",
    ),
    Mutant(
        "each base has a learning rate",
        CHECKPOINT,
        'group.get("lr", 0.0)',
        'group["lr"]',
        "test_checkpoint.py::test_rates_that_cant_be_looked_at",
    ),
    Mutant(
        "a learning rate on a device is read",
        CHECKPOINT,
        '        if isinstance(lr, Tensor) and lr.device.type != "cpu":\n            return False\n',
        "",
        "test_checkpoint.py::test_rates_that_cant_be_looked_at",
    ),
    Mutant(
        "a step that torch does not call hooks around",
        HOOKS,
        'getattr(type(base).step, "hooked", False)',
        'hasattr(base, "_optimizer_step_pre_hooks")',
        "test_misuse.py::test_an_optimizer_without_hooks_is_watched_too",
    ),
    Mutant(
        "step is patched again and again",
        HOOKS,
        "if not isinstance(method, _Method) or method.base() is not base:",
        "if True:",
        "test_hooks.py::test_wrapping_a_base_again_and_again",
    ),
    Mutant(
        "a copy keeps the original's patched step",
        HOOKS,
        "if not isinstance(method, _Method) or method.base() is not base:",
        "if not isinstance(method, _Method):",
        "test_hooks.py::test_a_copy_clears_and_steps_its_own",
    ),
    Mutant(
        "the dead stay around a patched step",
        HOOKS,
        "*(other for other in method.around if other.sam is not None)",
        "*method.around",
        "test_hooks.py::test_wrapping_a_base_again_and_again",
    ),
    Mutant(
        "the dead are asked before a step",
        HOOKS,
        "method() if method is not None and optimizer is self._base()",
        "method() if optimizer is self._base()",
        "test_hooks.py::test_wrapping_a_base_again_and_again",
    ),
    Mutant(
        "the dead are told after a step",
        HOOKS,
        "        if (method := self._after()) is not None:\n            method(self._found)",
        "        self._after()(self._found)",
        "test_hooks.py::test_wrapping_a_base_again_and_again",
    ),
    Mutant(
        "a copy's patched step steps the original",
        HOOKS,
        "        if base is not self.base():  # but",
        "        if False:  # but",
        "test_hooks.py::test_a_copy_whose_step_somebody_wrapped_steps_its_own",
    ),
    Mutant(
        "a step of somebody else's is lost",
        HOOKS,
        " if self._own is None else self._own(*args, **kwargs)",
        "",
        "test_hooks.py::test_a_copy_whose_step_somebody_wrapped_steps_its_own",
    ),
    Mutant(
        "zero_grad goes past the profiler",
        HOOKS,
        "elif lets_go and not recording():",
        "elif lets_go:",
        "test_torch_suite.py::test_profiler_shows_the_step",
    ),
    Mutant(
        "zero_grad of the class is lost",
        HOOKS,
        "type(base).zero_grad is _ZERO_GRAD and (",
        "(",
        "test_torch_suite.py::test_zero_grad_is_the_optimizers_own_where_it_is_not_torchs",
    ),
    Mutant(
        "the dead are told of zero_grad",
        HOOKS,
        "            if (mark := ref()) is not None:\n                mark",
        "            if True:\n                ref()",
        "test_hooks.py::test_wrapping_a_base_again_and_again",
    ),
    Mutant(
        "the dead stay around zero_grad",
        HOOKS,
        "*(ref for ref in patch.marks if ref() is not None)",
        "*patch.marks",
        "test_hooks.py::test_wrapping_a_base_again_and_again",
    ),
    Mutant(
        "the first gradient alone is watched",
        FRESHNESS,
        "for ordered in (params, reversed(params)):",
        "for ordered in (params,):",
        "test_misuse.py::test_a_second_backward_that_reaches_a_part_hears_nothing",
    ),
    Mutant(
        "the last gradient alone is watched",
        FRESHNESS,
        "for ordered in (params, reversed(params)):",
        "for ordered in (reversed(params),):",
        "test_misuse.py::test_a_second_backward_that_reaches_a_part_hears_nothing",
    ),
    Mutant(
        "a gradient on the stand-in is lost",
        FRESHNESS,
        "        self._accumulated = True",
        "        pass",
        "test_closure_passes.py::test_gradients_at_w_and_a_closure_for_the_second_pass",
    ),
    Mutant(
        "a closure that clears by itself goes unseen",
        FRESHNESS,
        "            self.cleared |= self._p.grad is not self._zeros\n",
        "",
        "test_closure_passes.py::test_an_attack_before_the_step_is_the_ascent_and_auto_says_so",
    ),
    Mutant(
        "the stand-in is watched for ever",
        FRESHNESS,
        "            self._handle.remove()\n            self.cleared",
        "            self.cleared",
        "test_closure_passes.py::test_the_stand_in_is_no_gradient",
    ),
    Mutant(
        "a closure that writes zeros goes unseen",
        OPTIMIZER,
        "        if state.clearing is not None:\n            state.clearing.cleared = True\n",
        "",
        "test_closure_passes.py::test_an_attack_before_the_step_is_the_ascent_and_auto_says_so",
    ),
    Mutant(
        "another scaler that steps is not remembered",
        AMP,
        "    if not in_scaler_step(sam):\n        return",
        "    if not in_scaler_step(sam) or sam in _stepped_by:\n        return",
        "test_amp_misuse.py::test_another_scaler_that_steps_is_known_from_then_on",
    ),
    Mutant(
        "a frozen parameter is watched",
        FRESHNESS,
        "is not None and p.requires_grad and p.is_leaf",
        "is not None and p.is_leaf",
        "test_misuse.py::test_a_frozen_parameter_is_not_watched",
    ),
    Mutant(
        "a result that retains its gradient is watched",
        FRESHNESS,
        "is not None and p.requires_grad and p.is_leaf",
        "is not None and p.requires_grad",
        "test_closure_passes.py::test_a_result_that_retains_its_gradient",
    ),
    Mutant(
        "a frozen parameter takes the stand-in",
        PERTURBATION,
        "if p.requires_grad and p.is_leaf]",
        "if p.is_leaf]",
        "test_closure_passes.py::test_layers_that_were_frozen_since_the_backward",
    ),
    Mutant(
        "a result that retains its gradient takes the stand-in",
        PERTURBATION,
        "if p.requires_grad and p.is_leaf]",
        "if p.requires_grad]",
        "test_closure_passes.py::test_a_result_that_retains_its_gradient",
    ),
    Mutant(
        "first_step() in a closure is taken",
        OPTIMIZER,
        "                if self._state.perturbed:  # w + e_w would be saved as w\n",
        "                if False:\n",
        "test_closure.py::test_first_step_in_the_closure_is_an_error",
    ),
)


def check(mutant: Mutant) -> str:
    """The source of the mutant's file; raises a ValueError unless its old text is there once."""
    source = (ROOT / mutant.path).read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: its old text is {source.count(mutant.old)} times in {mutant.path}")
    return source


def run(tests: list[str], path: Path | None, source: str) -> int:
    """Runs the tests, with `source` for the file at `path`."""
    original = SourceFileLoader.get_code

    def get_code(loader, fullname):
        if path is not None and Path(loader.path) == path:
            return compile(source, str(path), "exec", dont_inherit=True)
        return original(loader, fullname)

    SourceFileLoader.get_code = get_code
    return int(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *(str(HERE / t) for t in tests)]))


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
    """ "killed: ...", "SURVIVED", or "BROKEN: ..."."""
    source = check(mutant)
    status, printed = judge(mutant.tests.split(), ROOT / mutant.path, source.replace(mutant.old, mutant.new))
    if status is None:
        return f"killed: takes over {SECONDS} s"
    if status == 1 or status < 0:
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", printed, flags=re.MULTILINE)
        return f"killed: {failed[1] if failed else f'signal {-status}'}"
    if status == 0:
        return "SURVIVED"
    return f"BROKEN: status {status}: {printed[-300:]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutants, or parts of names; default: all")
    parser.add_argument("--list", action="store_true", help="show the mutants, judge none")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.names or any(name in m.name for name in options.names)]
    if options.list:
        print(*(f"{m.name:<60} {m.path}" for m in chosen), sep="\n")
        return 0
    for slow_to_import in ("hypothesis.stateful", "pytorch_optimizer", "torch.distributed.checkpoint.state_dict"):
        importlib.import_module(slow_to_import)  # not fastsam, and nothing that imports it
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # which would take most of a child's time
    torch.set_num_threads(1)
    tests = list(dict.fromkeys(test for m in chosen for test in m.tests.split()))
    status, printed = judge(tests)
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
