(() => {
  if (document.getAnimations) document.querySelectorAll(".wall").forEach(play);

  function play(wall) {
    const [controls, button, slider, output] = [".controls", "button", "input", "output"].map((s) => wall.querySelector(s));
    const reels = document.getAnimations().filter((a) => a.animationName === "reel" && wall.contains(a.effect.target));
    if (!reels.length) return;
    const frames = Number(slider.max);
    const length = reels[0].effect.getComputedTiming().duration;
    const frame = () => Math.min(frames - 1, Math.floor((((reels[0].currentTime ?? 0) % length) / length) * frames));
    const playing = () => reels[0].playState === "running";

    const show = () => {
      slider.value = frame() + 1;
      output.value = `${frame() + 1} / ${frames}`;
      button.textContent = playing() ? "Pause" : "Play";
      if (playing()) requestAnimationFrame(show);
    };
    // clips parsed later started later: put all on the first one's clock
    const align = () => reels.forEach((reel) => { reel.currentTime = reels[0].currentTime; });
    const goTo = (index) => reels.forEach((reel) => { reel.pause(); reel.currentTime = ((index + 0.5) / frames) * length; });

    button.addEventListener("click", () => {
      if (playing()) goTo(frame());
      else reels.forEach((reel) => reel.play());
      show();
    });
    slider.addEventListener("input", () => { goTo(Number(slider.value) - 1); show(); });
    controls.hidden = false;
    Promise.all(reels.map((reel) => reel.ready)).then(() => { if (playing()) align(); show(); });
  }
})();
