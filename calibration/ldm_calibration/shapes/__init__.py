"""The domain of the shipped model: sentences about coloured shapes, their images, and a grader of images."""
