"""From slides and fields of view to features of patches.

- Commands: `extract` (slides to feature files) and `count` (tiles only).
- Reading by microns per pixel, tissue and quality control, tiles, the frozen patch `encoder`.
- `store`: HDF5 files of features, ours, CLAM's and TRIDENT's; `fields`: images instead of slides.
- `images`: opening images safely.
"""
