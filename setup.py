from setuptools import find_packages, setup

# Folders that lie beside megatron_apt/ in the source tree and in it when installed. A
# top-level import name `kernels` would shadow Hugging Face's package of that name; what
# is in examples/ and tools/, `megatron-apt examples` copies into a folder of the user's.
BESIDE = {
    "megatron_apt.kernels": "kernels",
    "megatron_apt.examples": "examples",
    "megatron_apt.examples.slurm": "examples/slurm",
    "megatron_apt.tools": "tools",
    "megatron_apt.tools.benchmarks": "tools/benchmarks",
    "megatron_apt.tools.fuzzing": "tools/fuzzing",
}

# Upper bounds: what was tested together (the exact versions are in constraints.txt). Left
# open, pip on Python 3.12 takes Megatron-Core 0.19 and a newer torch, which have never run
# with this code. Megatron-Core's layers and torch's distributed parts change between minor
# releases, so those two are bound to the tested ones; most others to the tested major.
REQUIRES = [
    "torch>=2.11,<2.14",
    "megatron-core>=0.16.1,<0.17",
    # There are no wheels for other systems, where PyAV and Pillow do its work.
    'nvidia-dali-cuda130>=2.4,<3; platform_system == "Linux"',
    "av>=14,<19",
    "diffusers>=0.35,<0.43",
    "matplotlib>=3.9,<4",
    "msgspec>=0.19,<0.23",
    "numpy>=2.0,<2.5",
    "pillow>=11,<14",
    "psutil>=6,<8",
    "rich>=13,<16",
    "safetensors>=0.5,<0.9",
    "scikit-learn>=1.5,<1.10",
    "sentencepiece>=0.2,<0.3",
    "tensorboard>=2.18,<2.23",
    "transformers>=4.57,<6",
    'triton>=3.6,<3.10; platform_system == "Linux"',
    "tyro>=0.9,<2",
    "webdataset>=1.0,<2",
]

setup(
    name="megatron_apt",
    version="0.1.0",
    description="Megatron-style adversarial post-training: video diffusion transformers into one-step "
    "generators",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=[*find_packages(include=["megatron_apt", "megatron_apt.*"]), *BESIDE],
    package_dir=BESIDE,
    package_data={
        "megatron_apt.demo": ["*.template"],
        **{name: ["*.md", "*.sh", "*.sbatch"] for name in BESIDE},
    },
    install_requires=REQUIRES,
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.8,<3"],
        "dev": [
            "accelerate>=1.0,<2",
            "hypothesis>=6,<7",
            "pytest>=8,<9.1",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.9,<0.18",
            "ty==0.0.108",
            "scikit-video>=1.1.11,<2",
            "scipy>=1.14,<1.19",
        ],
        "docs": ["mkdocs-material>=9.7,<10", "mkdocstrings-python>=2,<3"],
        "wandb": ["wandb>=0.18,<1"],
    },
    entry_points={"console_scripts": ["megatron-apt=megatron_apt.cli:main"]},
)
