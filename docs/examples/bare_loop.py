"""Train in a loop of your own: `python bare_loop.py FOLDER` trains, or goes on where it was interrupted."""

import sys
from pathlib import Path

import torch
from lorentz import Force, error, loaders, loss

import ace


@torch.no_grad()
def score(model, batches):
    """Mean loss over batches; the mode of the model is left as it was."""
    training = model.training
    model.eval()
    total = sum(loss(model, batch) * len(batch[0]) for batch in batches)
    model.train(training)
    return total / len(batches.dataset)


def train(folder, epochs=20, until=None):
    """Train for so many epochs, planned; `until` an earlier one, as when the time is up."""
    torch.manual_seed(0)
    batches, validation = loaders()
    relaxed = ace.relax(Force())
    problem = ace.Problem(relaxed, loss)
    adam = torch.optim.Adam(relaxed.parameters(), 1e-2)
    optimizer = ace.PrimalDual(problem, adam, steps=len(batches) * epochs, clip=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=epochs)
    history = ace.History(folder / "history.csv")
    checkpoint = folder / "last.pt"

    first = 0
    if checkpoint.exists():
        state = ace.checkpoint.load(checkpoint)
        optimizer.load_state_dict(state["optimizer"])  # the model and the multipliers too
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"] + 1
        history.truncate(optimizer.step)  # what was recorded after the checkpoint

    for epoch in range(first, until or epochs):
        batches.sampler.set_epoch(epoch)
        for batch in batches:
            history.append(optimizer.roll(batch), epoch=epoch)
        schedule.step()
        scores = {"valid_relaxed": score(relaxed, validation)}
        with ace.restored(relaxed):  # as the model would be shipped: every γ acts as 0 in here
            scores["valid_restored"] = score(relaxed, validation)
        history.log(optimizer.step, epoch, **scores)
        history.flush()
        state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "epoch": epoch}
        ace.checkpoint.save(checkpoint, state)
    return relaxed, history


if __name__ == "__main__":
    relaxed, history = train(Path(sys.argv[1]))
    print(history.frame().query("quantity == 'valid_restored'").tail(1).to_string(index=False))
    model = ace.restore(relaxed)
    print(error(model))
