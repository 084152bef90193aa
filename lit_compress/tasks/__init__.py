"""Example tasks: models, data modules and a LightningModule for recipes, tests and benchmarks."""

from lit_compress.tasks.assets import (
    AssetsNotFoundError,
    assets_dir,
    load_weights,
    weights_path,
)
from lit_compress.tasks.classification import ImageClassifier
from lit_compress.tasks.data import CIFARDataModule, DigitsDataModule, ImageDataModule
from lit_compress.tasks.folder_data import CIFAR10JPEGDataModule, ImageFolderDataModule
from lit_compress.tasks.loader import ArrayLoader, Augmentation, Normalization
from lit_compress.tasks.models import build_model

__all__ = [
    "ArrayLoader",
    "AssetsNotFoundError",
    "Augmentation",
    "CIFAR10JPEGDataModule",
    "CIFARDataModule",
    "DigitsDataModule",
    "ImageClassifier",
    "ImageDataModule",
    "ImageFolderDataModule",
    "Normalization",
    "assets_dir",
    "build_model",
    "load_weights",
    "weights_path",
]
