"""Control: Gymnasium environments, scripted experts, datasets of their episodes, rollouts of policies and pictures of them."""
