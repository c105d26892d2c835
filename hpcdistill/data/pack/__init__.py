"""From images to packed data sets: recipes, their sources, the packer."""
