"""Small problems that several tests share; those with a closed form carry it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import nn

import ace


def network(width=6, layers=3):
    """Linear layers with tanh between them: 4 features in, 2 out."""
    sizes = [4, *[width] * (layers - 1), 2]
    stages = []
    for features_in, features_out in pairwise(sizes):
        stages += [nn.Linear(features_in, features_out), nn.Tanh()]
    return nn.Sequential(*stages[:-1])


def relaxed_network(**options):
    """``network`` with every linear layer relaxed."""
    model = network()
    return ace.relax(model, layers=nn.Linear, example=torch.zeros(1, 4), **options)


def regression(model, batch):
    """Mean squared error."""
    x, y = batch
    return (model(x) - y).square().mean()


def batches(count, size=8, seed=1):
    """Noisy regression data for ``network``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 4, generator=generator)
    noise = torch.randn(count, size, 2, generator=generator)
    y = torch.stack((x[..., 0] * x[..., 1], x[..., 2].sin()), -1) + 0.1 * noise
    return list(zip(x, y, strict=True))


class Even(nn.Module):
    """y = w |x|, invariant under x -> -x: the symmetry of ``symmetric_batches``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), 0.5))

    def forward(self, x):
        return x.abs() @ self.weight


def symmetric_batches(count, size=16, seed=1):
    """Data of an even function: the best odd part is zero."""
    x = torch.randn(count, size, 1, generator=torch.Generator().manual_seed(seed))
    return [(b, 2.0 * b.abs()) for b in torch.cat((x, -x), 1)]


class Shift(nn.Module):
    """x + θ."""

    def __init__(self, size):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1, size))

    def forward(self, x):
        return x + self.theta


class Direction(nn.Module):
    """A term that is a constant c, whatever its input."""

    def __init__(self, c):
        super().__init__()
        self.register_buffer("c", torch.as_tensor(c).reshape(1, -1))

    def forward(self, x):
        return self.c.expand_as(x)


class Parallel(nn.Module):
    """The outputs of several ``Shift`` layers side by side."""

    def __init__(self, layers, size):
        super().__init__()
        self.layers = nn.ModuleList(Shift(size) for _ in range(layers))

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], -1)


class Quadratic:
    r"""Convex quadratic in (θ, γ) with known KKT points, float64.

    z = θ + C γ, with one column of C a layer (its own block), and

        J = ½ zᵀ A z - bᵀ z + ½ μ |θ|²,

    whose Hessian in (θ, γ) is positive definite.
    """

    def __init__(self, layers=3, size=2, scale=1.0, seed=0):
        rng = np.random.default_rng(seed)
        n = layers * size
        root = rng.normal(size=(n, n))
        self.a = scale * (root @ root.T / n + 0.5 * np.eye(n))
        self.b = scale * rng.normal(size=n)
        self.mu = scale
        self.c = np.zeros((n, layers))
        directions = rng.normal(size=(layers, size))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        for layer, direction in enumerate(directions):
            self.c[layer * size : (layer + 1) * size, layer] = direction
        side = self.a @ self.c
        self.hessian = np.block([[self.a + self.mu * np.eye(n), side], [side.T, self.c.T @ side]])
        self.linear = np.concatenate((self.b, self.c.T @ self.b))
        self.n_theta = n
        made = iter(directions)
        self.model = ace.relax(
            Parallel(layers, size),
            layers=Shift,
            example=torch.zeros(1, size),
            term=lambda features_in, features_out: Direction(next(made)),
        )
        self.batch = torch.zeros(1, size)
        self.lr = 1.0 / np.linalg.eigvalsh(self.hessian).max()

    def loss(self, model, batch):
        z = model(batch)[0]
        theta = torch.cat([layer.theta[0] for layer in model.layers])
        a, b = torch.as_tensor(self.a), torch.as_tensor(self.b)
        return 0.5 * z @ a @ z - b @ z + 0.5 * self.mu * theta.square().sum()

    def solve(self, extra=None, fixed=None):
        """Minimise J + ½ γᵀ diag(extra) γ with the γ in ``fixed`` held; return θ, γ and ∂J/∂γ."""
        hessian = self.hessian.copy()
        if extra is not None:
            hessian[self.n_theta :, self.n_theta :] += np.diag(extra)
        x = np.zeros(len(hessian))
        held = {self.n_theta + layer: value for layer, value in (fixed or {}).items()}
        for index, value in held.items():
            x[index] = value
        free = [index for index in range(len(hessian)) if index not in held]
        x[free] = np.linalg.solve(hessian[np.ix_(free, free)], self.linear[free] - (hessian @ x)[free])
        gradient = self.hessian @ x - self.linear
        return x[: self.n_theta], x[self.n_theta :], gradient[self.n_theta :]

    @property
    def theta(self):
        return np.concatenate([layer.theta.detach().numpy()[0] for layer in self.model.layers])

    @property
    def gamma(self):
        return np.concatenate([r.gamma.detach().numpy() for r in ace.relaxations(self.model).values()])
