"""Optimizers that torch lacks, as a reader of their papers would write them in torch: full states, one tensor at a
time, none of the package's code."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import _muon


class Oracle(torch.optim.Optimizer):
    """Calls ``update(param, grad, state, group)`` on each parameter; ``state["step"]`` counts from 1."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, {"maximize": False, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                state["step"] = state.get("step", torch.tensor(0.0)) + 1
                for name in self.names(group):
                    state.setdefault(name, torch.zeros_like(param))
                grad = -param.grad if group["maximize"] else param.grad
                self.update(param, grad, state, {**group, "lr": float(group["lr"])})

    def names(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def update(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        raise NotImplementedError


class Lion(Oracle):
    def __init__(self, params: Any, lr: Any = 1e-4, betas: Any = (0.9, 0.99), weight_decay: float = 0, **rest: Any):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, **rest)

    def names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        m, (beta1, beta2) = state["exp_avg"], group["betas"]
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * torch.sign(m * beta1 + g * (1 - beta1)))
        m.mul_(beta2).add_(g, alpha=1 - beta2)


class LAMB(Oracle):
    def __init__(self, params: Any, lr: Any = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-6, **rest: Any):
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            **{"weight_decay": 1e-2, "bias_correction": True, "adapt": True, **rest},
        )

    def names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def update(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        m = state["exp_avg"].mul_(beta1).add_(g, alpha=1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if group["bias_correction"]:
            t = state["step"].item()
            m, v = m / (1 - beta1**t), v / (1 - beta2**t)
        r = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p
        trust = 1.0
        if group["adapt"] and p.norm() > 0 and r.norm() > 0:
            trust = (p.norm() / r.norm()).item()
        p.sub_(group["lr"] * trust * r)


class LARS(Oracle):
    def __init__(self, params: Any, lr: Any = 1e-3, momentum: float = 0.9, weight_decay: float = 0, **rest: Any):
        others = {"trust_coefficient": 1e-3, "eps": 1e-8, "nesterov": False, "adapt": True, **rest}
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, **others)

    def names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def update(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        lr, decay = group["lr"], group["weight_decay"]
        if group["adapt"] and p.norm() > 0 and g.norm() > 0:
            lr *= (group["trust_coefficient"] * p.norm() / (g.norm() + decay * p.norm() + group["eps"])).item()
        step = lr * (g + decay * p)
        if group["momentum"]:
            buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(step)
            step = step + group["momentum"] * buffer if group["nesterov"] else buffer
        p.sub_(step)


class AdEMAMix(Oracle):
    def __init__(self, params: Any, lr: Any = 1e-3, betas: Any = (0.9, 0.999, 0.9999), alpha: float = 5, **rest: Any):
        others = {"t_alpha": 0, "t_beta3": 0, "eps": 1e-8, "weight_decay": 1e-2, **rest}
        super().__init__(params, lr=lr, betas=betas, alpha=alpha, **others)

    def names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_slow", "exp_avg_sq")

    def update(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        beta1, beta2, beta3 = group["betas"]
        t, alpha = state["step"].item(), group["alpha"]
        if group["t_alpha"]:
            alpha = min(t * alpha / group["t_alpha"], alpha)
        if group["t_beta3"]:
            log_start, log_end, mu = math.log(beta1), math.log(beta3), t / group["t_beta3"]
            beta3 = min(math.exp(log_start * log_end / ((1 - mu) * log_end + mu * log_start)), beta3)
        m1 = state["exp_avg"].mul_(beta1).add_(g, alpha=1 - beta1)
        m2 = state["exp_avg_slow"].mul_(beta3).add_(g, alpha=1 - beta3)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m1 / (1 - beta1**t) + alpha * m2) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
        p.sub_(group["lr"] * (update + group["weight_decay"] * p))


class MuonAdamW(Oracle):
    """Of all parameters by one of the two rules, Muon's iterations as torch has them, for one matrix after another."""

    def __init__(self, params: Any, lr: Any = 1e-3, use_muon: bool = True, heads: int = 1, **rest: Any):
        shared = {"weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "momentum": 0.95, "nesterov": True}
        super().__init__(params, lr=lr, use_muon=use_muon, heads=heads, **{**shared, **rest})

    def names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["use_muon"] else ("exp_avg", "exp_avg_sq")

    def update(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"])
        if group["use_muon"]:
            self.update_by_muon(p, g, state["momentum_buffer"], group)
            return
        (beta1, beta2), t = group["betas"], state["step"].item()
        m = state["exp_avg"].mul_(beta1).add_(g, alpha=1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.sub_(group["lr"] * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + group["eps"]))

    def update_by_muon(self, p: Tensor, g: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
        buffer.lerp_(g, 1 - group["momentum"])
        direction = g.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        columns = p.shape[-1]
        matrices = p.shape[0] if p.dim() == 3 else group["heads"]
        rows = p.numel() // (matrices * columns)
        for mine, each in zip(p.view(matrices, rows, columns), direction.view(matrices, rows, columns), strict=True):
            orthogonal = _muon._zeropower_via_newtonschulz(each, (3.4445, -4.775, 2.0315), 5, 1e-7)
            mine.sub_(group["lr"] * 0.2 * math.sqrt(max(rows, columns)) * orthogonal.to(p.dtype))


def cautiously(update: Tensor, g: Tensor) -> Tensor:
    """As the code of Cautious Optimizers (Liang et al., 2024) has it."""
    mask = (update * g > 0).to(g.dtype)
    return update * (mask / mask.mean().clamp(min=1e-3))


class CautiousAdam(Oracle):
    decoupled = False

    def __init__(self, params: Any, lr: Any = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-8, **rest: Any):
        super().__init__(params, lr=lr, betas=betas, eps=eps, **{"weight_decay": 0.0, "amsgrad": False, **rest})

    def names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))

    def update(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if self.decoupled:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        else:
            g = g + group["weight_decay"] * p
        (beta1, beta2), t = group["betas"], state["step"].item()
        m = state["exp_avg"].mul_(beta1).add_(g, alpha=1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if group["amsgrad"]:
            v = state["max_exp_avg_sq"].copy_(state["max_exp_avg_sq"].maximum(v))
        p.sub_(group["lr"] * cautiously(m / (1 - beta1**t), g) / ((v / (1 - beta2**t)).sqrt() + group["eps"]))


class CautiousAdamW(CautiousAdam):
    decoupled = True


class CautiousLion(Lion):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        m, (beta1, beta2) = state["exp_avg"], group["betas"]
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * cautiously(torch.sign(m * beta1 + g * (1 - beta1)), g))
        m.mul_(beta2).add_(g, alpha=1 - beta2)


class CautiousSGD(Oracle):
    def __init__(self, params: Any, lr: Any = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0, **rest: Any):
        others = {"dampening": 0.0, "nesterov": False, **rest}
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, **others)

    def names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        g = g + group["weight_decay"] * p
        is_first = state["step"].item() == 1
        buffer = state["momentum_buffer"].mul_(group["momentum"])
        buffer.add_(g, alpha=1 if is_first else 1 - group["dampening"])
        update = g + group["momentum"] * buffer if group["nesterov"] else buffer
        p.sub_(group["lr"] * cautiously(update, g))


class AdamWScheduleFree(Oracle):
    """In train mode, where a parameter is y; every parameter has its own count of steps and sum of weights."""

    def __init__(self, params: Any, lr: Any = 0.0025, betas: Any = (0.9, 0.999), eps: float = 1e-8, **rest: Any):
        others = {"weight_decay": 0.0, "warmup_steps": 0, "r": 0.0, "weight_lr_power": 2.0, **rest}
        super().__init__(params, lr=lr, betas=betas, eps=eps, **others)

    def names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("z", "exp_avg_sq")

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        y, (beta1, beta2), t = p, group["betas"], state["step"].item()
        if t == 1:
            state["z"] = y.clone()
            state["sums"] = 0.0, 0.0
        lr = group["lr"] * min(1.0, t / group["warmup_steps"]) if group["warmup_steps"] else group["lr"]
        weight_sum, lr_max = state["sums"]
        lr_max = max(lr_max, lr)
        weight = t ** group["r"] * lr_max ** group["weight_lr_power"]
        state["sums"] = weight_sum + weight, lr_max
        c = weight / (weight_sum + weight)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        d = g / ((v / (1 - beta2**t)).sqrt() + group["eps"]) + group["weight_decay"] * y
        x = (y - (1 - beta1) * state["z"]) / beta1
        z = state["z"].sub_(lr * d)
        y.copy_((1 - beta1) * z + beta1 * ((1 - c) * x + c * z))
