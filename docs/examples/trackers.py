"""Send a history to a tracker of experiments; `train` is handed the history and records in it."""

import ace


def with_tensorboard(train, folder):
    """Train; `tensorboard --logdir FOLDER` shows it."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:

        def sink(step, values):
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return train(ace.History(sink=sink))


def with_wandb(train, project):
    """Train as a new run of a project of Weights & Biases."""
    import wandb

    with wandb.init(project=project) as run:
        return train(ace.History(sink=lambda step, values: run.log(values, step=step)))


def with_mlflow(train, experiment):
    """Train as a new run of an experiment of MLflow."""
    import mlflow

    mlflow.set_experiment(experiment)
    with mlflow.start_run():
        return train(ace.History(sink=lambda step, values: mlflow.log_metrics(values, step=step)))
