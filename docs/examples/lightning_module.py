"""Train with Lightning: `python lightning_module.py FOLDER` trains, or goes on from FOLDER/last.ckpt."""

import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lorentz import Force, error, loaders, loss

import ace


class Relaxed(lightning.LightningModule):
    """A relaxed model that Lightning trains under its constraint."""

    def __init__(self, accumulate=1):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False  # Lightning's name for "update() does the backward pass and the steps"
        self.model = ace.relax(Force())
        self.resumed = None

    def configure_optimizers(self):
        return torch.optim.Adam(self.model.parameters(), 1e-2)

    def on_fit_start(self):  # the model is on its device, a checkpoint was read
        steps = self.trainer.max_steps  # updates; -1 if only the epochs are limited
        if steps == -1:
            steps = self.trainer.estimated_stepping_batches // self.hparams.accumulate
        self.problem = ace.Problem(self.model, loss)
        self.primal_dual = ace.PrimalDual(
            self.problem,
            self.optimizers(),
            steps=steps,
            accumulate=self.hparams.accumulate,
            scaler=getattr(self.trainer.precision_plugin, "scaler", None),
        )
        if self.resumed is not None:
            self.primal_dual.load_state_dict(self.resumed)
            self.resumed = None

    def training_step(self, batch, index):
        self.primal_dual.probe(batch)
        value = self.problem.evaluate(batch)
        with torch.autocast(self.device.type, enabled=False):  # Lightning's is for the forward pass, and lasts too long
            rollout = self.primal_dual.update(value, backward=self.manual_backward)
        return {"rollout": rollout}  # for the callback

    def validation_step(self, batch, index):
        self.log("valid_relaxed", loss(self.model, batch), sync_dist=True)
        with ace.restored(self.model):  # as the model would be shipped: every γ acts as 0 in here
            self.log("valid_restored", loss(self.model, batch), sync_dist=True)

    def on_save_checkpoint(self, checkpoint):  # weights and Adam's moments are in there already: saved once
        checkpoint["primal_dual"] = self.primal_dual.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.resumed = checkpoint["primal_dual"]


class Record(lightning.Callback):
    """Keep the history, log γ, violation and multiplier of each layer, and restore the model when training is over."""

    def __init__(self, path):
        self.path = path

    def on_train_start(self, trainer, module):
        self.history = ace.History(self.path if trainer.is_global_zero else None)
        self.history.truncate(trainer.global_step)  # what was recorded after the checkpoint

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if (index + 1) % module.hparams.accumulate == 0:
            self.history.sink = lambda step, values: module.log_dict(values)
            self.history.append(outputs["rollout"], epoch=trainer.current_epoch)
            self.history.sink = None  # the scores are logged by the module

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            scores = {key: trainer.callback_metrics[key] for key in ("valid_relaxed", "valid_restored")}
            self.history.log(trainer.global_step, trainer.current_epoch, **scores)
            self.history.flush()

    def on_fit_end(self, trainer, module):  # after the last checkpoint
        ace.restore(module.model)


def train(folder, epochs=20, accumulate=1, callbacks=(), **options):
    """Fit, or go on from the last checkpoint in the folder; the options are those of Lightning's Trainer."""
    torch.manual_seed(0)
    module, record = Relaxed(accumulate), Record(folder / "history.csv")
    checkpoints = ModelCheckpoint(folder, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=epochs, default_root_dir=folder, callbacks=[record, checkpoints, *callbacks], **options
    )
    last = folder / "last.ckpt"
    trainer.fit(module, *loaders(), ckpt_path=last if last.exists() else None)
    return module, record.history


if __name__ == "__main__":
    module, history = train(Path(sys.argv[1]))
    print(history.frame().query("quantity == 'valid_restored'").tail(1).to_string(index=False))
    model = module.model
    print(error(model))
