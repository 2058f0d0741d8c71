"""The model and the data of the examples: the force on a charge, from its velocity and the fields."""

import torch
from e3nn import o3
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import ace


class Force(torch.nn.Module):
    """An equivariant network that knows nothing of ace."""

    irreps_in, irreps_hidden, irreps_out = "2x1o + 1x1e", "8x1o + 8x1e", "1x1o"

    def __init__(self):
        super().__init__()
        self.embed = o3.Linear(self.irreps_in, self.irreps_hidden)
        self.mix = o3.FullyConnectedTensorProduct(self.irreps_hidden, self.irreps_hidden, self.irreps_hidden)
        self.read = o3.Linear(self.irreps_hidden, self.irreps_out)

    def forward(self, x):
        x = self.embed(x)
        with torch.autocast(x.device.type, enabled=False):  # e3nn's tensor products do not run under autocast
            x = x.to(self.mix.weight.dtype)
            x = x + self.mix(x, x)
        return self.read(x)


def loss(model, batch):
    """Mean squared error of a batch (inputs, forces)."""
    inputs, forces = batch
    return mse_loss(model(inputs).to(forces.dtype), forces)


class Shuffled(torch.utils.data.Sampler):
    """An order that follows from the number of the epoch, so that there is no state of it to save."""

    def __init__(self, size):
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.size

    def __iter__(self):
        yield from torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist()


def loaders(batch_size=32):
    """Batches for training and for validation."""
    inputs = torch.randn(320, 9, generator=torch.Generator().manual_seed(0))
    velocity, electric, magnetic = inputs.split(3, dim=1)
    forces = electric + torch.linalg.cross(velocity, magnetic)
    training, validation = TensorDataset(inputs[:256], forces[:256]), TensorDataset(inputs[256:], forces[256:])
    return DataLoader(training, batch_size, sampler=Shuffled(256)), DataLoader(validation, batch_size)


def error(model):
    """Equivariance error of a model under rotations and reflections."""
    inputs = torch.randn(64, 9, generator=torch.Generator().manual_seed(1))
    return ace.equivariance_error(model, inputs, ace.O3(), inputs={0: Force.irreps_in}, outputs=Force.irreps_out)
