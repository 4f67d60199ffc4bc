// A click on a picture shows it large; the arrow keys go through its group.
const viewer = document.querySelector('dialog');
const [previous, next, close] = viewer.querySelectorAll('button');
const large = viewer.querySelector('img');
let group = [];
let place = 0;

function show(index) {
  place = (index + group.length) % group.length;
  const shown = group[place];
  const ratio = shown.naturalWidth / shown.naturalHeight;
  large.src = shown.src;
  large.alt = shown.alt;
  large.className = shown.className;
  // As large as the window takes; on a phone larger, to be moved about.
  large.style.width = `max(min(94vw, ${ratio} * 86vh), 800px)`;
  viewer.querySelector('span').textContent =
    `${shown.alt} (${place + 1} of ${group.length})`;
}

for (const image of document.querySelectorAll('main img')) {
  image.classList.add('zooms');
  image.tabIndex = 0;
  image.onclick = () => {
    group = [...image.closest('.group').querySelectorAll('img')];
    show(group.indexOf(image));
    viewer.showModal();
  };
  image.onkeydown = (event) => {
    if (event.key === 'Enter') image.onclick();
  };
}
previous.onclick = () => show(place - 1);
next.onclick = () => show(place + 1);
close.onclick = () => viewer.close();
viewer.onclick = (event) => {
  if (event.target === viewer || event.target === large) viewer.close();
};
viewer.onkeydown = (event) => {
  if (event.key === 'ArrowLeft') show(place - 1);
  if (event.key === 'ArrowRight') show(place + 1);
};
