"""Train with Accelerate: `python accelerate_loop.py FOLDER` trains, or goes on where it was interrupted."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from lorentz import Force, error, loaders, loss

import ace


@torch.no_grad()
def score(accelerator, model, batches):
    """Mean loss over the batches of all processes; the mode of the model is left as it was."""
    training = model.training
    model.eval()
    losses = [accelerator.gather_for_metrics(loss(model, batch).expand(len(batch[0]))) for batch in batches]
    model.train(training)
    return torch.cat(losses).mean()


def train(folder, epochs=20, until=None, accumulate=1, **options):
    """Train for so many epochs, planned; `until` an earlier one; the options are those of the Accelerator."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=accumulate, **options)
    relaxed = ace.relax(Force())
    adam = torch.optim.Adam(relaxed.parameters(), 1e-2)
    model, adam, *both = accelerator.prepare(relaxed, adam, *loaders())
    batches, validation = both
    problem = ace.Problem(model, loss)
    updates = -(-len(batches) // accumulate)  # in an epoch: Accelerate makes one of what is left at its end
    optimizer = ace.PrimalDual(problem, adam, steps=updates * epochs, scaler=accelerator.scaler)
    accelerator.register_for_checkpointing(optimizer)
    history = ace.History(folder / "history.csv" if accelerator.is_main_process else None)

    if (folder / "last").exists():
        accelerator.load_state(folder / "last")
        history.truncate(optimizer.step)  # what was recorded after the checkpoint

    for epoch in range(optimizer.step // updates, until or epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            with accelerator.accumulate(model):
                optimizer.probe(batch)
                value = problem.evaluate(batch)
                rollout = optimizer.update(value, backward=accelerator.backward, last=accelerator.sync_gradients)
            if accelerator.sync_gradients:
                history.append(rollout, epoch=epoch)
        scores = {"valid_relaxed": score(accelerator, model, validation)}
        with ace.restored(model):  # as the model would be shipped: every γ acts as 0 in here
            scores["valid_restored"] = score(accelerator, model, validation)
        history.log(optimizer.step, epoch, **scores)
        history.flush()
        accelerator.save_state(folder / "last", safe_serialization=False)  # safetensors drops the empty biases of e3nn
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False), history


if __name__ == "__main__":
    relaxed, history = train(Path(sys.argv[1]))
    print(history.frame().query("quantity == 'valid_restored'").tail(1).to_string(index=False))
    model = ace.restore(relaxed)
    print(error(model))
