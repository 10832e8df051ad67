"""Plans that ship. A recipe is a module of this package with a plan function of the same name."""
