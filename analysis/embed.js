const figure = JSON.parse(document.getElementById("figure-data").textContent);
const done = () => { document.body.dataset.ready = "yes"; };
figure ? Bokeh.embed.embed_item(figure).then(done) : done();
