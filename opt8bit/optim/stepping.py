"""Stepping: the one step of every optimizer, from gradients to the backends' calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property
from itertools import chain, islice
from operator import is_
from typing import Any

import torch
from torch import Tensor

from opt8bit.backends import Backend, Step, can_capture, note_writes, wanted_backend
from opt8bit.optim import shards
from opt8bit.optim.absent import with_gradient
from opt8bit.optim.asked import Asked, asked_of, backend_of, columns, divided
from opt8bit.optim.noting import noted_where_seen
from opt8bit.optim.plan import Plan
from opt8bit.optim.ruled import Ruled
from opt8bit.optim.running import Place, Running
from opt8bit.optim.states import CODED_DTYPES, check, initialized, others, will_be_coded

SUPPORTED_DTYPES = (*CODED_DTYPES, torch.float64, torch.complex64, torch.complex128)
Scaling = tuple["Tensor | None", "Tensor | None"]  # what GradScaler hands over: grad_scale and found_inf
Shares = list[tuple[Backend, Step]]  # of the backends in a step


class Stepping(Ruled):
    """An optimizer that steps all of its parameters in one call for each device."""

    _update_untraced: Callable[..., None]  # where torch.compile's graph breaks, once: it shall not trace addresses

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        _leave_to_python()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _leave_to_python()

    profile_hook_step = staticmethod(noted_where_seen)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, in one call per device.

        ``torch.amp.GradScaler`` hands its scale and its finding of infinities over (``grad_scale``, ``found_inf``):
        the gradients are unscaled in the same pass, and left as they are; a step with infinities is skipped.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse, or is not of its parameter's shape; or a CUDA graph is captured without
                ``capturable``. Nothing has been updated then.
            ValueError: ``fused=True`` and no compiled kernels can serve a parameter; or a state is not of its
                parameter's shape and dtype, or was made with another block size. Nothing has been updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        update = self._update_untraced if torch.compiler.is_compiling() else self._update
        update()
        return loss

    def _update(self) -> None:
        """Takes a step with the gradients that are there."""
        is_captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if is_captured:
            self._check_capture()
        scaling = shards.scaling(getattr(self, "grad_scale", None)), shards.scaling(getattr(self, "found_inf", None))
        usual = self._usual(scaling)
        if usual is None:
            self._update_unusual(scaling, is_captured)
        else:
            shares, params, grads = usual
            self._take(shares, {}, is_captured)
            note_writes(with_gradient(params, grads))

    def _usual(self, scaling: Scaling) -> tuple[Shares, list[Tensor], list[Tensor | None]] | None:
        """Returns the backends' shares, the parameters and the gradients of a step like the one before, or None."""
        plan = self._running.plans.get(None)
        if plan is None or plan.usual is None:
            return None
        facts = [self._running.facts.of(*each) for each in enumerate(self.param_groups)]
        tensors = plan.usual.tensors(self.param_groups, facts, self.state)
        if tensors is None:
            return None
        shares = plan.steps(*tensors, [each.hyper for each in facts], list(self.state.values()), *scaling)
        return None if shares is None else (shares, *tensors)

    @torch.no_grad()
    def _update_unusual(self, scaling: Scaling, is_captured: bool) -> None:
        """Takes a step of any kind."""
        backward = self._running.backward
        backward.watch()
        done = backward.finish(is_scaled=any(value is not None for value in scaling))
        # Everything is checked before the first state is made, and the first backend writes.
        fresh: dict[Tensor, dict[str, Any]] = {}
        together, one_by_one = divided(self._all_asked(done))
        for each in one_by_one:
            self._check_divided(each)
        shares = self._planned(None, together, fresh, scaling)
        if self._running.plans[None].has_overlaps:
            self._take([], fresh, is_captured)
            self._step_in_order(together, scaling, is_captured)
        else:
            self._take(shares, fresh, is_captured)
        for each in one_by_one:
            self._step_gathered(each, scaling)
        note_writes(list(chain.from_iterable(with_gradient(each.owners, each.grads) for each in together)))
        self._give_back(together)

    def _step_in_order(self, asked: Sequence[Asked], scaling: Scaling, is_captured: bool) -> None:
        """Steps one group after another, as parameters of several groups share memory: each sees what others wrote."""
        for index, each in enumerate(asked):
            self._take(self._planned((index, None), [each], {}, scaling), {}, is_captured)

    def _give_back(self, stepped: Sequence[Asked]) -> None:
        """Brings parameters back that were stepped on the CPU."""
        if any(group["offload"] for group in self.param_groups):
            for param in [param for each in stepped if each.group["offload"] for param in each.owners]:
                self._running.hosts.give_back(param)
            self._running.hosts.keep({param for group in self.param_groups for param in group["params"]})

    def _check_divided(self, asked: Asked) -> None:
        """Raises for one parameter what the plan of many raises: before anything is gathered."""
        (param,), (shard,), (grad,), (state,) = asked.owners, asked.params, asked.grads, self._states([asked])
        self._check_asked(asked, 0)
        assert grad is not None
        backend_of(asked, shard, grad)
        if state:
            coded = will_be_coded(state, asked.rule, param, asked.group)
            check(asked.where(0), shard, asked.rule, asked.group, self._initialized(asked, 0, shard, state, coded))

    def _step_gathered(self, asked: Asked, scaling: Scaling) -> None:
        """Steps a divided parameter by a rule that looks at whole ones: all processes gather it, and step it alike."""
        (param,), group = asked.owners, asked.group
        state = self.state.get(param, {})
        had = {name: shards.everywhere(value) for name, value in state.items()}
        whole, grad = shards.everywhere(param.detach()), shards.everywhere(param.grad)
        states = self._initialized(asked, 0, whole, had, will_be_coded(had, asked.rule, param, group))
        asked = asked._replace(params=[whole], grads=[grad], owners=[whole], placements=None)
        shares = Plan([asked], [states]).steps(*columns([asked]), [states], *scaling)
        assert shares is not None
        self._take(shares, {}, False)
        shards.local(param).copy_(shards.part(whole, param))
        stored = shards.sharded(shards.cut(states, param), param, group["block_size"])
        self._keep(param, {**others(state, asked.rule, states), **stored})

    def _take(self, shares: Shares, fresh: Mapping[Tensor, Mapping[str, Any]], is_captured: bool) -> None:
        """Adds the states that are missing, and lets every backend take its share."""
        for param, state in fresh.items():
            self._keep(param, state)
        if is_captured:  # the graph reads what was prepared whenever it is replayed, whatever becomes of the plans
            self._running.of_graphs.extend(step.prepared for _, step in shares)
        for backend, step in shares:
            backend.step(step)
        for _, step in shares:
            for param, contiguous in step.copies:
                param.copy_(contiguous)

    def _keep(self, param: Tensor, state: Mapping[str, Any]) -> None:
        self.state[param].clear()
        self.state[param].update(state)

    def _planned(
        self, place: Place, asked: Sequence[Asked], fresh: dict[Tensor, dict[str, Any]], scaling: Scaling
    ) -> Shares:
        """Returns the share of each backend. States that they need and that are not there yet are added to ``fresh``.

        Args:
            place: the group, and the parameter in it, that the plan is of; None for all.
        """
        plans = self._running.plans
        for gone in [each for each in plans if each and each[0] >= len(self.param_groups)]:
            del plans[gone]
        states = self._states(asked)
        plan, wanted = plans.get(place), columns(asked)
        shares = plan.steps(*wanted, states, *scaling) if plan and plan.is_for(asked) else None
        if shares is not None:
            return shares
        made: list[dict[str, Tensor]] = []
        for each in asked:
            for i, (shard, param) in enumerate(zip(each.params, each.owners, strict=True)):
                self._check_asked(each, i, is_alone=place is not None and place[1] is not None)
                state = states[len(made)]
                coded = will_be_coded(state, each.rule, param, each.group)
                made.append(self._initialized(each, i, shard, state, coded))
        owners = [(each, param) for each in asked for param in each.owners]
        # As they will lie in the optimizer, with what others keep there.
        kept = [
            {**others(state, each.rule, mine), **mine}
            for (each, _), state, mine in zip(owners, states, made, strict=True)
        ]
        plan = plans[place] = Plan(asked, kept)
        shares = plan.steps(*wanted, kept, *scaling)
        assert shares is not None
        for (each, param), mine in zip(owners, made, strict=True):
            stored = shards.sharded(mine, param, each.group["block_size"])
            fresh[param] = {**others(self.state.get(param, {}), each.rule, mine), **stored}
        return shares

    def _initialized(
        self, asked: Asked, i: int, shard: Tensor, state: Mapping[str, Any], coded: bool
    ) -> dict[str, Tensor]:
        return initialized(asked.where(i), state, asked.rule, shard, asked.group, coded, self.initial(asked.group))

    def _check_asked(self, asked: Asked, i: int, *, is_alone: bool = False) -> None:
        """Raises for a parameter that cannot be stepped, or not with its gradient; by its name."""
        try:
            self._check_supported(asked.owners[i], asked.group)
            if asked.grads[i] is not None and not is_alone:  # alone, it has been fetched, and may be gone
                shards.check_grad(asked.owners[i])
        except (RuntimeError, TypeError, ValueError) as error:
            raise type(error)(f"{asked.where(i)}: {error}") from None

    def _all_asked(self, done: Set[Tensor]) -> list[Asked]:
        """Returns what a step is asked to do with each group, but with the parameters that are done already."""
        running, wanted, first, result = self._running, wanted_backend(), 0, []
        for index, group in enumerate(self.param_groups):
            facts = running.facts.of(index, group)
            result.append(asked_of(group, facts, running.hosts, first, wanted, state=self.state, done=done))
            first += len(group["params"])
        return result

    @cached_property
    def _running(self) -> Running:
        return Running(self, Stepping._prepared)

    def _prepared(self, index: int, alone: int) -> Callable[[], None]:
        """Returns the step of one parameter, which its host has or is about to have, for a thread to take."""
        first = sum(len(group["params"]) for group in self.param_groups[:index])
        group, running = self.param_groups[index], self._running
        facts, wanted = running.facts.of(index, group), wanted_backend()
        asked = asked_of(group, facts, running.hosts, first, wanted, state=self.state, alone=alone)
        asked = asked._replace(group=dict(group))  # the thread shall not see what is written into it later

        def step() -> None:
            fresh: dict[Tensor, dict[str, Any]] = {}
            self._take(self._planned((index, alone), [asked], fresh, (None, None)), fresh, False)

        return step

    def _states(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """Returns those that are there, of the parameters or of their shards."""
        owners = list(chain.from_iterable(each.owners for each in asked))
        # Where they lie in the order of the parameters, as is usual, none has to be looked up.
        if len(owners) == len(self.state) and all(map(is_, owners, self.state)):
            states = list(self.state.values())
        else:
            states = [self.state.get(param, {}) for param in owners]
        if all(each.placements is None for each in asked):
            return states
        remaining, result = iter(states), []
        for each in asked:
            mine = islice(remaining, len(each.owners))
            result += mine if each.placements is None else map(shards.local_states, mine)
        return result

    def _check_capture(self) -> None:
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                f"a step of {type(self).__name__} is captured in a CUDA graph: that takes capturable=True"
            )

    def _check_supported(self, param: Tensor, group: dict[str, Any]) -> None:
        whole = self.rule(group).whole
        by_chance = group["stochastic_rounding"] and param.dtype == torch.bfloat16 and not whole
        shards.check(param, by_chance=by_chance)
        if group["offload"] and whole and shards.is_divided(param):
            raise TypeError(f"{type(self).__name__} looks at whole parameters: of shards it takes no offload")
        if param.dtype not in SUPPORTED_DTYPES:
            raise TypeError(f"parameters must be one of {', '.join(map(str, SUPPORTED_DTYPES))}, got {param.dtype}")
        for name in ("stochastic_rounding", "compensation"):
            if group[name] and param.dtype == torch.float16:
                raise ValueError(f"{name}=True is for bfloat16 parameters, got one of torch.float16")
        if group["capturable"] and not can_capture(param, self.rule(group)):
            raise ValueError(
                f"capturable must be left out for {type(self).__name__} on {param.device}, where no kernels in Triton "
                "serve it, got True"
            )
        if group["capturable"] and group["offload"]:
            raise ValueError("capturable=True and offload exclude each other: a graph cannot hold a step on the CPU")
        self.check_param(param, group)


def _leave_to_python() -> None:
    """Imports half of torch when the first optimizer is made; torch.optim has done so by then."""
    if not hasattr(Stepping, "_update_untraced"):
        Stepping._update_untraced = torch.compiler.disable(Stepping._update)  # type: ignore[method-assign]
