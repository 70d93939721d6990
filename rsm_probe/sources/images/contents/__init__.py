"""What the items of a data set and the batches of a loader contain: images and their labels.

Begin with `dataset_items.py` (the image of an item), then `item_labels.py` and `loaded_batches.py`.
"""
