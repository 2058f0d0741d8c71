"""Steerable E(3)-equivariant graph network (Brandstetter et al., ICLR 2022), up to l = 1, on e3nn."""

from __future__ import annotations

import math

import torch
from e3nn import o3
from e3nn.math import normalize2mom
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from benchmarks.models.graphs import centroid, mean_by_target, sum_by_target

ATTRIBUTE = o3.Irreps("1x0e+1x1o")
"""Irreps of the steerable attributes of nodes and edges."""


def steerable(vectors: Tensor) -> Tensor:
    """Spherical harmonics of degree 0 and 1, normalised by component: (1, √3 x / |x|).

    Args:
        vectors: Shape (..., 3).

    Returns:
        Attributes, irreps 1x0e+1x1o, shape (..., 4).

    Example:
        >>> steerable(torch.tensor([0.0, 2.0, 0.0]))
        tensor([1.0000, 0.0000, 1.7321, 0.0000])
    """
    return torch.cat((torch.ones_like(vectors[..., :1]), math.sqrt(3) * normalize(vectors, dim=-1)), -1)


class Gate(nn.Module):
    """SiLU on scalars; vectors are multiplied by the sigmoid of as many further scalars.

    A bias is added to all scalars first, since tensor products have none. Both functions are scaled
    to keep the second moment of a normal input, as in e3nn.

    Args:
        multiplicity: Number m of scalars and of vectors.

    Example:
        >>> Gate(2)(torch.zeros(1, 10)).shape  # 2 scalars, 2 gates, 2 vectors -> 2 scalars, 2 vectors
        torch.Size([1, 8])
    """

    def __init__(self, multiplicity: int) -> None:
        super().__init__()
        self.multiplicity = multiplicity
        self.bias = nn.Parameter(torch.zeros(2 * multiplicity))
        self.scalar = normalize2mom(torch.nn.functional.silu)
        self.gate = normalize2mom(torch.sigmoid)

    def forward(self, features: Tensor) -> Tensor:
        """Map irreps (2m)x0e+(m)x1o to (m)x0e+(m)x1o; shape (..., 5m) to (..., 4m)."""
        m = self.multiplicity
        scalars, vectors = features.split((2 * m, 3 * m), -1)
        scalars, gates = (scalars + self.bias).split(m, -1)
        gated = vectors.unflatten(-1, (m, 3)) * self.gate(gates).unsqueeze(-1)
        return torch.cat((self.scalar(scalars), gated.flatten(-2)), -1)


class EdgeTensorProduct(nn.Module):
    """Fully connected tensor product of (f_i, f_j, e_ij) with the attribute of the edge from j to i.

    With s the scalars and v the vectors of the concatenated features and (1, a) the attribute::

        scalars out:  W_00 s + W_11 v · a / √3        vectors out:  W_01 s a + W_10 v

    This is `tensor_product` at a fraction of the cost: the weights act before the features are
    gathered, and a graph has fewer nodes than edges.

    Args:
        multiplicity: Number m of scalars and of vectors per node.
        edge_scalars: Number of scalars e_ij per edge.

    Example:
        >>> product = EdgeTensorProduct(multiplicity=2, edge_scalars=1)
        >>> edges, attribute = torch.tensor([[0, 1], [1, 0]]), steerable(torch.randn(2, 3))
        >>> product(torch.randn(2, 8), torch.ones(2, 1), edges, attribute).shape
        torch.Size([2, 10])
    """

    def __init__(self, multiplicity: int, edge_scalars: int) -> None:
        super().__init__()
        m = self.multiplicity = multiplicity
        # Columns: inputs of node i, of node j, of the edge. Rows: 2m scalars out, then m vectors out.
        bound = 1 / math.sqrt(4 * m + edge_scalars)
        self.scalar_weight = nn.Parameter(torch.empty(3 * m, 2 * m + edge_scalars).uniform_(-bound, bound))
        self.vector_weight = nn.Parameter(torch.empty(3 * m, 2 * m).uniform_(-bound, bound))

    def forward(self, features: Tensor, edge_scalars: Tensor, edge_index: Tensor, attribute: Tensor) -> Tensor:
        """Contract.

        Args:
            features: Node features, irreps (m)x0e+(m)x1o, shape (N, 4m).
            edge_scalars: Shape (E, number of edge scalars).
            edge_index: Source j and target i of each edge, shape (2, E).
            attribute: Edge attributes, irreps 1x0e+1x1o, the scalar being 1, shape (E, 4).

        Returns:
            Irreps (2m)x0e+(m)x1o, shape (E, 5m).
        """
        m = self.multiplicity
        source, target = edge_index

        def on_edges(rows: Tensor, weight: Tensor) -> Tensor:
            to_target, from_source = weight[:, :m], weight[:, m : 2 * m]
            return linear(rows, to_target).index_select(0, target) + linear(rows, from_source).index_select(0, source)

        scalars, vectors = features.split((m, 3 * m), 1)
        # Coordinates before channels: the weights and the sum over coordinates then run over rows.
        vectors = vectors.unflatten(1, (m, 3)).transpose(1, 2)
        s = on_edges(scalars, self.scalar_weight) + linear(edge_scalars, self.scalar_weight[:, 2 * m :])
        dotted, passed = (on_edges(vectors, rows) for rows in self.vector_weight.split((2 * m, m)))
        a = attribute[:, 1:, None]
        scalars = s[:, : 2 * m] + (a * dotted).sum(1) / math.sqrt(3)
        vectors = torch.addcmul(passed, a, s[:, None, 2 * m :])
        return torch.cat((scalars, vectors.transpose(1, 2).flatten(1)), 1)


class SEGNNLayer(nn.Module):
    """One steerable message-passing step.

    Brandstetter et al. 2022, equations 7 and 8; TP_a is a tensor product with the attribute a, σ a
    gate, â_ij and â_i the attributes of the edge and of the node::

        m_ij = σ TP_â_ij( σ TP_â_ij(f_i, f_j, |x_i - x_j|, a_ij) )
        f_i  <- f_i + TP_â_i( σ TP_â_i(f_i, Σ_j m_ij) )

    Args:
        multiplicity: Number m of scalars and of vectors per node.
        edge_scalars: Number of scalars per edge.
    """

    def __init__(self, multiplicity: int, edge_scalars: int) -> None:
        super().__init__()
        m = self.multiplicity = multiplicity
        hidden, gated = irreps(m), irreps(2 * m, m)
        self.message_in, self.message_in_gate = EdgeTensorProduct(m, edge_scalars), Gate(m)
        self.message_out, self.message_out_gate = tensor_product(hidden, gated), Gate(m)
        self.update_in, self.update_gate = tensor_product(irreps(2 * m), gated), Gate(m)
        self.update_out = tensor_product(hidden, hidden, gain=0.1)

    def forward(
        self,
        features: Tensor,
        node_attribute: Tensor,
        edge_index: Tensor,
        edge_attribute: Tensor,
        edge_scalars: Tensor,
    ) -> Tensor:
        """Update the features.

        Args:
            features: Irreps (m)x0e+(m)x1o, shape (N, 4m).
            node_attribute: Irreps 1x0e+1x1o, the scalar being 1, shape (N, 4).
            edge_index: Source and target node of each edge, shape (2, E).
            edge_attribute: Irreps 1x0e+1x1o, the scalar being 1, shape (E, 4).
            edge_scalars: Shape (E, number of edge scalars).

        Returns:
            Irreps (m)x0e+(m)x1o, shape (N, 4m).
        """
        m = self.multiplicity
        message = self.message_in(features, edge_scalars, edge_index, edge_attribute)
        message = self.message_out(self.message_in_gate(message), edge_attribute)
        message = self.message_out_gate(message)
        collected = sum_by_target(message, edge_index[1], len(features))
        scalars, vectors = zip(features.split((m, 3 * m), 1), collected.split((m, 3 * m), 1), strict=True)
        both = torch.cat((*scalars, *vectors), 1)
        updated = self.update_gate(self.update_in(both, node_attribute))
        return features + self.update_out(updated, node_attribute)


class SEGNN(nn.Module):
    """Predicts positions from positions and velocities, equivariantly to E(3) and to node permutations.

    The attribute of an edge is the spherical harmonics of x_i - x_j, that of a node the mean over its
    edges plus the spherical harmonics of its velocity (its scalar kept at 1); both are computed once.
    Positions are relative to the centroid of the graph, so that translations are exact as well.

    Args:
        node_features: Number d_h of invariant node features.
        edge_features: Number d_e of invariant edge attributes.
        features: Number of irreps per node: half are scalars, half vectors. Even.
        layers: Number of message-passing steps.

    Example:
        >>> model = SEGNN(node_features=1, edge_features=1, features=8, layers=2)
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> pos, vel = torch.randn(2, 3), torch.randn(2, 3)
        >>> model(pos, vel, torch.ones(2, 1), edges, torch.ones(2, 1), torch.zeros(2, dtype=torch.long)).shape
        torch.Size([2, 3])
    """

    def __init__(self, node_features: int, edge_features: int, features: int = 64, layers: int = 4) -> None:
        super().__init__()
        m = features // 2
        self.embed = tensor_product(irreps(node_features, 2), irreps(m))
        self.layers = nn.ModuleList(SEGNNLayer(m, 1 + edge_features) for _ in range(layers))
        self.readout_in, self.readout_gate = tensor_product(irreps(m), irreps(2 * m, m)), Gate(m)
        self.readout_out = tensor_product(irreps(m), o3.Irreps("1x1o"), gain=0.1)

    def forward(
        self, pos: Tensor, vel: Tensor, h: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor
    ) -> Tensor:
        """Predict positions.

        Args:
            pos: Positions, shape (N, 3).
            vel: Velocities, shape (N, 3).
            h: Invariant node features, shape (N, d_h).
            edge_index: Source and target node of each edge, shape (2, E).
            edge_attr: Invariant edge attributes, shape (E, d_e).
            batch: Graph index of each node, ascending from 0, shape (N,).

        Returns:
            Predicted positions, shape (N, 3).
        """
        source, target = edge_index
        relative = pos.index_select(0, target) - pos.index_select(0, source)
        distance = torch.linalg.vector_norm(relative, dim=1, keepdim=True)
        edge_scalars = torch.cat((distance, edge_attr), 1)
        edge_attribute = steerable(relative)
        around = mean_by_target(edge_attribute[:, 1:], target, len(pos))
        at_node = steerable(vel)
        node_attribute = torch.cat((at_node[:, :1], at_node[:, 1:] + around), 1)

        features = self.embed(torch.cat((h, pos - centroid(pos, batch), vel), 1), node_attribute)
        for layer in self.layers:
            features = layer(features, node_attribute, edge_index, edge_attribute, edge_scalars)
        features = self.readout_gate(self.readout_in(features, node_attribute))
        return pos + self.readout_out(features, node_attribute)


def irreps(scalars: int, vectors: int | None = None) -> o3.Irreps:
    """Irreps of some scalars and (as many, unless told otherwise) vectors.

    Example:
        >>> irreps(2)
        2x0e+2x1o
    """
    return o3.Irreps([(scalars, "0e"), (scalars if vectors is None else vectors, "1o")])


class AttributeProduct(o3.FullyConnectedTensorProduct):
    """e3nn's fully connected tensor product with `ATTRIBUTE`, its scalar being 1, in half of the time.

    Weights, state dict and results are e3nn's, the latter up to rounding. With s the scalars and v the vectors of the
    features and (1, a) the attribute::

        scalars out:  W_00 s + W_11 v · a / √3        vectors out:  W_01 s a + W_10 v

    The contraction with a comes first, so that each output is one matrix product on rows.

    Args:
        irreps_in: Scalars and vectors, (n)x0e+(k)x1o; either may be missing.
        irreps_out: The same.

    Example:
        >>> product = AttributeProduct(irreps(4), irreps(3, 2))
        >>> features, attribute = torch.randn(5, 16), steerable(torch.randn(5, 3))
        >>> slow = o3.FullyConnectedTensorProduct.forward(product, features, attribute)
        >>> torch.allclose(product(features, attribute), slow, atol=1e-5)
        True
    """

    def __init__(self, irreps_in: o3.Irreps, irreps_out: o3.Irreps) -> None:
        super().__init__(irreps_in, ATTRIBUTE, irreps_out, path_normalization="none")
        self.scalars, self.vectors = (irreps_in.count(kind) for kind in ("0e", "1o"))
        self.scalars_out, self.vectors_out = (irreps_out.count(kind) for kind in ("0e", "1o"))
        # of each weight: which irreps of the features and of the attribute it joins, in the order of e3nn
        self.joined = [(self.irreps_in1[i.i_in1].ir.l, self.irreps_in2[i.i_in2].ir.l) for i in self.instructions]
        self.sizes = [math.prod(i.path_shape) for i in self.instructions]

    def forward(self, features: Tensor, attribute: Tensor) -> Tensor:  # type: ignore[override]
        """Contract.

        Args:
            features: Irreps ``irreps_in``, shape (N, dimension).
            attribute: Irreps 1x0e+1x1o, the scalar being 1, shape (N, 4).

        Returns:
            Irreps ``irreps_out``, shape (N, dimension).
        """
        none = self.weight[:0]
        weights = {(0, 0): none, (1, 1): none, (0, 1): none, (1, 0): none}
        weights |= dict(zip(self.joined, self.weight.split(self.sizes), strict=True))
        s, v = features.split((self.scalars, 3 * self.vectors), -1)
        # coordinates before channels: products and sums then run over rows
        v = v.unflatten(-1, (self.vectors, 3)).transpose(1, 2).contiguous()
        a = attribute[:, 1:, None]
        outputs = []
        if self.scalars_out:
            weight = torch.cat((weights[0, 0], weights[1, 1])).view(-1, self.scalars_out)
            outputs.append(torch.cat((s, (v * a).sum(1) / math.sqrt(3)), -1) @ weight)
        if self.vectors_out:
            along = s @ weights[0, 1].view(-1, self.vectors_out)
            passed = v @ weights[1, 0].view(-1, self.vectors_out)
            outputs.append(torch.addcmul(passed, along.unsqueeze(1), a).transpose(1, 2).flatten(-2))
        return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]


def tensor_product(irreps_in: o3.Irreps, irreps_out: o3.Irreps, gain: float = 1.0) -> nn.Module:
    """Fully connected tensor product with `ATTRIBUTE`, weights uniform in ±gain/√fan-in.

    The fan-in is in the weights, as in ``torch.nn.Linear``, and not in a factor beside normal weights,
    which would slow Adam down by its root. Sums over neighbours make features grow: a gain of 0.1 where
    something is added to features or positions lets layers start close to the identity.
    """
    product = AttributeProduct(irreps_in, irreps_out)
    bound = gain / math.sqrt(irreps_in.num_irreps)
    nn.init.uniform_(product.weight, -bound, bound)
    return product
