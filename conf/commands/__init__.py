"""Commands whose fields would be taken for the groups of the main tree, each with a tree of its own."""
