"""E(n)-equivariant graph network with velocities (Satorras, Hoogeboom and Welling, ICML 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from benchmarks.models.graphs import centroid, mean_by_target, sum_by_target


class EGNNLayer(nn.Module):
    """One message-passing step on features and positions.

    With x_ij = x_i - x_j, messages from j to i and the velocity v_i of the input frame (Satorras et
    al. 2021, equations 3 to 7)::

        m_ij = φ_e(h_i, h_j, |x_ij|², a_ij)
        x_i <- x_i + φ_v(h_i) v_i + mean_j x_ij φ_x(m_ij)
        h_i <- h_i + φ_h(h_i, Σ_j m_ij)

    φ_x, φ_v and φ_h have one hidden layer, φ_e ends in a second SiLU. The first linear map of φ_e is
    applied by parts, to nodes before they are gathered on the edges, which is the same function.

    Args:
        hidden: Width of the features and of the hidden layers.
        edge_features: Number d_e of edge attributes.

    Example:
        >>> layer = EGNNLayer(hidden=8, edge_features=1)
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> h, pos = layer(torch.ones(2, 8), torch.randn(2, 3), torch.randn(2, 3), edges, torch.ones(2, 1))
        >>> h.shape, pos.shape
        (torch.Size([2, 8]), torch.Size([2, 3]))
    """

    def __init__(self, hidden: int, edge_features: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.message_node = nn.Linear(hidden, 2 * hidden, bias=False)
        self.message_edge = nn.Linear(1 + edge_features, hidden)
        self.message_out = nn.Linear(hidden, hidden)
        self.position = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1, bias=False))
        self.velocity = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.feature = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        # Positions must start close to the input: a first step far away is a poor start and, with
        # squared distances among the inputs of the next layer, an unstable one.
        nn.init.xavier_uniform_(self.position[-1].weight, gain=1e-3)

    def forward(
        self, h: Tensor, pos: Tensor, vel: Tensor, edge_index: Tensor, edge_attr: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update features and positions.

        Args:
            h: Node features, shape (N, hidden).
            pos: Positions, shape (N, 3).
            vel: Velocities of the input frame, shape (N, 3).
            edge_index: Source and target node of each edge, shape (2, E).
            edge_attr: Invariant edge attributes, shape (E, d_e).

        Returns:
            Features (N, hidden) and positions (N, 3).
        """
        source, target = edge_index
        relative = pos.index_select(0, target) - pos.index_select(0, source)
        invariants = torch.cat((relative.square().sum(1, keepdim=True), edge_attr), 1)
        to_target, from_source = self.message_node(h).chunk(2, 1)
        message = silu(
            to_target.index_select(0, target) + from_source.index_select(0, source) + self.message_edge(invariants)
        )
        message = silu(self.message_out(message))
        shift = mean_by_target(relative * self.position(message), target, len(h))
        collected = sum_by_target(message, target, len(h))
        return h + self.feature(torch.cat((h, collected), 1)), pos + self.velocity(h) * vel + shift


class EGNN(nn.Module):
    """Predicts positions from positions and velocities, equivariantly to E(3) and to node permutations.

    Positions are centred per graph at the start and the centroid is added back at the end. That is
    no change of the network, since its layers commute with translations, but whatever is added to
    its layers then sees centred coordinates.

    Args:
        node_features: Number d_h of invariant node features.
        edge_features: Number d_e of invariant edge attributes.
        hidden: Width of the features and of the hidden layers.
        layers: Number of message-passing steps.

    Example:
        >>> model = EGNN(node_features=1, edge_features=1, hidden=8, layers=2)
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> pos, vel = torch.randn(2, 3), torch.randn(2, 3)
        >>> model(pos, vel, torch.ones(2, 1), edges, torch.ones(2, 1), torch.zeros(2, dtype=torch.long)).shape
        torch.Size([2, 3])
    """

    def __init__(self, node_features: int, edge_features: int, hidden: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(node_features, hidden)
        self.layers = nn.ModuleList(EGNNLayer(hidden, edge_features) for _ in range(layers))

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
        centre = centroid(pos, batch)
        h, pos = self.embed(h), pos - centre
        for layer in self.layers:
            h, pos = layer(h, pos, vel, edge_index, edge_attr)
        return pos + centre
