// Draws a plotly figure when it comes into view (or is unfolded); plotly.js is loaded by the first of them.
const folder = document.currentScript.src.replace(/lazy\.js.*$/, '');
document.addEventListener('DOMContentLoaded', () => {
  let library;
  const load = () => library ??= new Promise(done => {
    const script = document.createElement('script');
    script.src = folder + 'plotly.min.js'; script.onload = done;
    document.head.append(script); });
  const draw = async box => {
    await load();
    const figure = JSON.parse(box.querySelector('script').textContent);
    await Plotly.newPlot(box, figure.data, figure.layout, {responsive: true, displaylogo: false});
    if (figure.frames) await Plotly.addFrames(box, figure.frames);
    box.dataset.drawn = 'yes'; };
  const seen = new IntersectionObserver(entries => entries.forEach(entry => {
    if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); } }), {rootMargin: '300px'});
  document.querySelectorAll('.plotly-lazy').forEach(box => seen.observe(box)); });
