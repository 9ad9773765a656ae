"""A thin LightningModule around a task, and the Trainer that runs it."""
