"""Every number of the project: configuration dataclasses and the Hydra tree. Standard library and YAML only."""
