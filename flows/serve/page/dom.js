// What the pages' scripts share.

export const at = (id) => document.getElementById(id);

export function made(tag, content, properties = {}) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...[content].flat());
  return element;
}

export function percent(share) {
  if (share < 0.0005) return share > 0 ? "< 0.1 %" : "0 %";
  if (share >= 0.9995) return share < 1 ? "> 99.9 %" : "100 %";
  return `${(100 * share).toFixed(1)} %`;
}
