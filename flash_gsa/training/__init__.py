"""From a recipe to a trained model.

    load_recipe   recipe_file.py     what to do: YAML and overrides, checked by the classes of recipe.py
    train         trainer.py         the loop over its parts: inputs, engine, loss, optimizer, schedule
    TrainResult   checkpoint.py …    what it leaves: checkpoints, metrics, a picture of the loss

The modules are imported by name (`from flash_gsa.training.trainer import train`): a program that reads a
recipe need not wait for all that trains a model.
"""
