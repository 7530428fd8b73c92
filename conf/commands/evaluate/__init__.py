"""The tree of `groundwave evaluate`: beside `conf/model/`, Hydra would take model=FOLDER for a choice of that group."""
