"""The fall-back term: rows and features of a layer's tensors, found by running the example twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ace
from ace.generic import components

ROTATION = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]


class Mix(nn.Module):
    """Mixes the channels of vectors; ``axis`` is that of the channels."""

    def __init__(self, inputs, outputs, axis):
        super().__init__()
        self.dense = nn.Linear(inputs, outputs, bias=False)
        self.axis = axis

    def forward(self, x):
        return self.dense(x.movedim(self.axis, -1)).movedim(-1, self.axis)


class Lifted(nn.Module):
    """Positions [..., 3] to features in some layout, through one layer, to an invariant."""

    def __init__(self, layer, lift):
        super().__init__()
        self.layer, self.lift = layer, lift

    def forward(self, pos):
        return self.layer(self.lift(pos)).square().sum()


LAYOUTS = {
    "nodes, vector, channel": ((7, 3), lambda pos: pos[:, :, None] * torch.arange(1.0, 5.0), -1, (-2, -1)),
    "nodes, channel, vector": ((7, 3), lambda pos: pos[:, None] * torch.arange(1.0, 5.0)[:, None], -2, (-2, -1)),
    "nodes, matrix, channel": (
        (7, 3),
        lambda pos: (pos[:, :, None] * pos[:, None] + torch.eye(3))[..., None] * torch.arange(1.0, 5.0),
        -1,
        (-3, -2, -1),
    ),
    "batch, nodes, channel, vector": (
        (2, 7, 3),
        lambda pos: pos[:, :, None] * torch.arange(1.0, 5.0)[:, None],
        -2,
        (-2, -1),
    ),
    "batch, channel, vector, points": (
        (2, 7, 3),
        lambda pos: pos.mT[:, None] * torch.arange(1.0, 5.0)[:, None, None],
        1,
        (-3, -2),
    ),
    "batch, channel, vector, points, neighbours": (
        (2, 7, 3),
        lambda pos: (pos.mT[:, None] * torch.arange(1.0, 5.0)[:, None, None])[..., None].expand(-1, -1, -1, -1, 6),
        1,
        (-4, -3),
    ),
}


@pytest.mark.parametrize("outputs", [4, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_and_components_are_features_all_else_is_rows(layout, outputs):
    shape, lift, axis, features = LAYOUTS[layout]
    pos = torch.randn(shape)
    model = Lifted(Mix(4, outputs, axis), lift)
    plain = model.layer(lift(pos))
    relaxed = ace.relax(model, layers=Mix, example=pos)
    term = relaxed.layer.relaxation.term
    assert term.reads[0].axes == term.writes[0].axes == features
    change = relaxed.layer(lift(pos)) - plain
    rows = [a for a in range(-change.dim(), 0) if a not in features]
    expected = term.map(lift(pos).movedim(features, tuple(range(-len(features), 0))).flatten(-len(features)))
    found = change.permute(*[a % change.dim() for a in [*rows, *features]]).flatten(-len(features))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    larger = torch.randn(*shape[:-2], 2 * shape[-2], 3)
    assert relaxed(larger).isfinite()  # rows may be of any number


def test_a_list_of_vectors_is_no_list_of_points():
    x = torch.randn(9, 4, 3)
    relaxed = ace.relax(Mix(4, 6, 1), layers=Mix, example=x)
    assert relaxed.relaxation.term.map.in_features == 12
    assert relaxed.relaxation.term.map.out_features == 18


def test_components_of_spherical_tensors_stacked_in_one_axis():
    from e3nn import o3

    irreps = o3.Irreps("1x0e+1x1o+1x2e")
    values = irreps.randn(6, -1, 8, normalization="component")
    turned = torch.einsum("ij,njc->nic", irreps.D_from_matrix(ROTATION * torch.linalg.det(ROTATION)), values)
    assert components(values, turned, 1e-4) == (-2,)
    assert components(values, values, 1e-4) == ()
    assert components(values, torch.randn_like(values), 1e-4) == ()


def test_passed_on_inputs_are_not_written():
    class PassOn(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(4, 4)

        def forward(self, h, pos):
            return self.dense(h), pos

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = PassOn()

        def forward(self, h, pos):
            h, pos = self.layer(h, pos)
            return h.sum() + pos.norm(dim=-1).sum()

    relaxed = ace.relax(Model(), layers=PassOn, example=(torch.randn(5, 4), torch.randn(5, 3)))
    assert [write.key for write in relaxed.layer.relaxation.term.writes] == [0]


def test_a_layer_that_writes_into_its_dict_is_refused_by_name():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(3, 3)

        def forward(self, data):
            data["pos"] = self.dense(data["pos"])
            return data

    with pytest.raises(ace.errors.NotAttachable, match="writes its results into the dict"):
        ace.relax(Writes(), layers=Writes, example=({"pos": torch.randn(5, 3)},))


class Degrees(nn.Module):
    """Scalars and vectors of each point by degree, from those and the distances to all other points."""

    def __init__(self, channels, start=None):
        super().__init__()
        self.scalars, self.vectors = (nn.Linear(channels, channels, bias=False) for _ in range(2))
        self.radial = nn.Linear(1, 1)
        if start is not None:
            for layer in (self.scalars, self.vectors):
                nn.init.constant_(layer.weight, start)

    def forward(self, features, distances):
        weight = self.radial(distances[..., None]).mean(-2, keepdim=True)
        vectors = self.vectors(features["1"].mT).mT
        return {"0": self.scalars(features["0"].mT).mT * weight, "1": vectors * weight}


class Cloud(nn.Module):
    """A network that writes to the dict that its last layer returned."""

    def __init__(self, start=None):
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.layers = nn.ModuleList([Degrees(4, start), Degrees(4)])

    def forward(self, coors):
        relative = coors[:, :, None] - coors[:, None]
        distances = relative.norm(dim=-1)
        scalars = self.embed(distances.sum(-1, keepdim=True))
        features = {"0": scalars[..., None], "1": relative.sum(2)[:, :, None] * torch.arange(1.0, 5.0)[:, None]}
        for layer in self.layers:
            change = layer(features, distances)
            features = {key: value + change[key] for key, value in features.items()}
        out = self.layers[0](features, distances)
        out["0"] = out["0"].squeeze(-1)
        return {key: value + features[key].reshape(value.shape) for key, value in out.items()}


@pytest.mark.parametrize("start", [None, 0.0])
def test_all_degrees_are_read_and_written_and_neighbours_are_not_features(start):
    coors = torch.randn(2, 6, 3)
    relaxed = ace.relax(Cloud(start), example=coors)
    assert list(ace.relaxations(relaxed)) == ["layers.0", "layers.1"]
    for relaxation in ace.relaxations(relaxed).values():
        assert [(port.inside, port.width) for port in relaxation.term.reads] == [(("0",), 4), (("1",), 12)]
        assert [(write.key, write.width) for write in relaxation.term.writes] == [("0", 4), ("1", 12)]
    assert relaxed(torch.randn(2, 9, 3))["1"].shape == (2, 9, 4, 3)


def test_a_dict_that_is_changed_afterwards_is_recorded_as_it_was():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Degrees(4)

        def forward(self, coors):
            vectors = coors[:, :, None] * torch.arange(1.0, 5.0)[:, None]
            features = {"0": vectors.norm(dim=-1, keepdim=True), "1": vectors}
            out = self.layer(features, torch.cdist(coors, coors))
            out["0"] = out["0"].squeeze(-1).sum(-1)
            return out

    relaxed = ace.relax(Last(), layers=Degrees, example=torch.randn(2, 6, 3))
    assert [write.width for write in relaxed.layer.relaxation.term.writes] == [4, 12]


def test_the_parts_of_a_data_come_in_the_order_of_their_names():
    from torch_geometric.data import Data

    from ace.calls import parts_of

    data = Data(**{name: torch.ones(1) for name in "zyxwvut"})
    assert list(parts_of(data)) == sorted("zyxwvut")
