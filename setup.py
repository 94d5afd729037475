"""What pyproject.toml cannot say: sodfast needs the kernels of its own version."""

from pathlib import Path

from setuptools import setup

VERSION = (Path(__file__).parent / "kernels" / "VERSION").read_text().strip()

setup(
    install_requires=[
        f"sodfast-kernels=={VERSION}",
        "torch>=2.11",
        "transformers>=5.17",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "numpy>=2.0",
        "scipy>=1.14",
        "matplotlib>=3.9",
        "pydantic>=2.9",
        "omegaconf>=2.3",
        "pyyaml>=6.0",
        "jinja2>=3.1",
        "typer>=0.15",
        "rich>=13.9",
    ]
)
